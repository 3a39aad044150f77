"""flexprefill: the distance that picks a head's pattern, the blocks, and the output. Counts are turned into blocks of 128 keys, as released."""

import torch
from golden.choices import chosen
from golden.vectors import Vectors, case

import regard
from regard.algebra.blocks import heads_of, pooled
from regard.algebra.probes import last_mass
from regard.zoo.sparse.flexprefill import distance


@case("c0", "c1", "c2", "c3", "c4")
def prefill(v: Vectors) -> None:
    q, k, value = (v(name).transpose(1, 2) for name in "qkv")
    if v["inter"]:  # query head h reads key head h mod Hkv
        k, value = (x[:, torch.arange(v["H"]) % v["Hkv"]] for x in (k, value))
    sizes = {"gamma": v["gamma"], "tau": v["tau"], "min_budget": v["min_budget"], "max_budget": v["max_budget"], "block_size": v["block"]}
    m = regard.get("flexprefill", **sizes)
    scaled = q * q.shape[-1] ** -0.5
    mass, _ = last_mass(scaled, k, v["block"])
    d = distance(scaled, heads_of(pooled(k, v["block"]), v["H"]), mass, v["block"])
    v.same(d[0], "jsd")
    assert torch.equal(d[0] < v["tau"], v("query_aware"))
    assert torch.equal(chosen(m, q, k)[0], v("blocks"))
    v.same(regard.attend(q, k, value, m).transpose(1, 2)[:, v("out_rows").long()], "out")
