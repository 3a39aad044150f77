"""hyperattention with the released order of buckets, its draws and directions, and zero keys at the end of ragged sequences."""

import torch
from golden.vectors import Vectors, case

import regard
from regard.zoo.sparse.hyperattention import hyper_attention


@case("c0", "c1", "c2", "c3", "c4", "c5")
def whole(v: Vectors) -> None:
    q, k, value = list(v.leaves("q", "k", "v").values())
    options = {"block_size": v["block"], "samples": v["samples"], "hash_bits": v["projs"], "min_length": v["min_seq"]}
    options |= {"buckets": "gray", "zero_keys": True}
    levels = [v(name).long() for name in ("sampled0", "sampled1") if v.has(name)]
    given = {"directions": v("proj_dir"), **({"draws": torch.cat(levels, 1)} if levels else {})}
    mask = regard.Causal() if v["causal"] else None
    out = regard.attend(q, k, value, regard.get("hyperattention", **options), mask=mask, **given)
    v.same(out, "out")
    for name, grad in zip("qkv", torch.autograd.grad((out * v("w")).sum(), (q, k, value)), strict=True):
        v.same(grad, f"d{name}", v.grad)
    v.same(hyper_attention(q, k, value, causal=v["causal"], **options, **given)[1], "lse")
