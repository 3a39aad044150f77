"""fused-neighborhood: lines, maps and volumes, by all three backends, with log-sum-exps and the sets of neighbours."""

import numpy as np
import torch
from golden.vectors import Vectors, case

import regard
from regard.zoo.sparse.fused_neighborhood import na1d, na2d, na3d, neighbours


@case("c0", "c1", "c2", "c3", "c4", "c5")
def backends(v: Vectors) -> None:
    shape, kernel, dilation, causal = (tuple(v[name]) for name in ("shape", "kernel", "dilation", "causal"))
    run = (na1d, na2d, na3d)[len(shape) - 1]
    options = {"dilation": dilation, "is_causal": causal, "scale": v.get("scale")}
    for backend in ("fused", "unfused", "naive"):
        leaves = list(v.leaves("q", "k", "v").values())
        out = run(*leaves, kernel, backend=backend, return_lse=backend == "fused", **options)
        if backend == "fused":
            out, lse = out
            v.same(lse, "lse")
        v.same(out, "out")
        for name, grad in zip("qkv", torch.autograd.grad((out * v("w")).sum(), leaves), strict=True):
            v.same(grad, f"d{name}", v.grad, what=f"d{name} {backend}")


@case("c0", "c1", "c2", "c3", "c4", "c5", dtypes=(torch.float64,))
def sets(v: Vectors) -> None:
    shape, kernel, dilation, causal = (tuple(v[name]) for name in ("shape", "kernel", "dilation", "causal"))
    n = torch.Size(shape).numel()
    want = torch.from_numpy(np.unpackbits(v.arrays[f"mask_{v.config}"], axis=1)[:, :n].astype(bool))
    at, none = torch.arange(n), torch.zeros(1, dtype=torch.long)
    seen = regard.Neighborhood(shape, kernel, 1, dilation, causal).visible(none, none, at[:, None], at, {"k_len": n})
    assert torch.equal(seen.expand(n, n), want)
    place, real = neighbours(shape, kernel, dilation, causal)
    assert torch.equal(torch.zeros(n, n, dtype=torch.long).scatter_add_(1, place, real.long()).bool(), want)
