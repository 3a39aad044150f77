"""spargeattn: the map of blocks, similarities, and int8 rounding."""

import torch
from golden.choices import chosen
from golden.vectors import Vectors, case

import regard
from regard.zoo.sparse.spargeattn import int8, self_similarity


@case("c0", "c1", "c2", "c3")
def plan(v: Vectors) -> None:
    q, k = v("q")[None], v("k")[None]
    options = {"theta": tuple(v["theta"]), "block_q": v["BLKQ"], "block_k": v["BLKK"], "first": v["sink"], "causal": v["causal"]}
    options |= {"tau": tuple(v["tau"])} if v["tau"] else {"ratio": tuple(v["topk"])}
    keep = chosen(regard.get("spargeattn", smooth=v["smooth"], **options), q, k)
    assert torch.equal(keep[0], v("block_map").bool())
    centred = k - k.mean(-2, keepdim=True) if v["smooth"] else k
    for x, name, size in ((q, "q", v["BLKQ"]), (centred, "k", v["BLKK"])):
        found = self_similarity(x, size)[0]
        full = ~v(f"selfsim_{name}").isnan()
        v.same(found[full], v(f"selfsim_{name}")[full], 1e-6)
        if v.dtype == torch.float32:  # the precision of the released kernel: its halves are rounded there
            steps, scale = int8(x, size)
            v.same(scale[0, ..., 0, 0], f"{name}_scale", 1e-7)
            off = steps.flatten(-3, -2)[0, :, : v["N"]] - v(f"{name}_int8")
            assert int((off != 0).sum()) <= off.numel() // 2000  # entries within a rounding of a half
            assert float(off.abs().max()) <= 1
