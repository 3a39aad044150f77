"""Checks of gin-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.algebra import Causal
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.graphs import gathered
from regard.lab.verification import check
from regard.zoo.softmax.gin_attention import Adjacency, GINAttention, SparseGINAdapter, aggregated


@check(
    "gin-attention",
    "GIN's and PNA's aggregations == a node at a time, rows without edges included",
    below=1e-10,
    control="the mean in place of the sum",
)
def _() -> tuple[float, float]:
    x = torch.randn(1, 9, 16, dtype=F64)
    layer = GINAttention(16, 2, process="relu", threshold=0.3).double()
    nn.init.constant_(layer.eps, 0.4)
    a = layer.adjacency(x)[0]
    a[:, 4] = 0
    v = torch.randn(9, 6, dtype=F64)
    pna = max(naive.gap(aggregated(a[h], v), gathered(a[h], v)) for h in range(2))
    own = x[0].unflatten(-1, (2, 8)).transpose(0, 1)

    def gin(mean: bool) -> Tensor:
        fresh = layer.adjacency(x)[0]
        fresh = fresh / fresh.sum(-1, keepdim=True).clamp_min(1e-9) if mean else fresh
        mixed = torch.stack(
            [torch.stack([0.4 * own[h, i] + sum(fresh[h, i, j] * own[h, j] for j in range(9)) for i in range(9)]) for h in range(2)]
        )
        return layer.out(layer.mlp(mixed[None]).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    return max(pna, naive.gap(layer(x), gin(False))), naive.gap(layer(x), gin(True))


@check(
    "gin-attention", "identity networks, eps = 0, softmax adjacency == attention with the input as values", below=1e-12, control="eps = 1"
)
def _() -> tuple[float, float]:
    layer = GINAttention(16, 2, project=False, mlp=nn.Identity()).double()
    x = torch.randn(2, 9, 16, dtype=F64)
    q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in (layer.adjacency.q(x), layer.adjacency.k(x), x))
    truth = attend(q, k, v, mask=Causal()).transpose(1, 2).flatten(-2)
    own = naive.gap(layer(x), truth)
    nn.init.ones_(layer.eps)
    return own, naive.gap(layer(x), truth)


@check(
    "gin-attention",
    "adapter: scale 0 changes no bit and the base gets no gradient; dense == list of edges; no future",
    below=1e-12,
    control="scale 0.5, in the first of these",
)
def _() -> tuple[float, float]:
    base = Adjacency(16, 2).double()
    adapter = SparseGINAdapter(16, kappa=5.0, floor=0.1).double()
    h = torch.randn(2, 9, 16, dtype=F64)
    silent = naive.gap(adapter(h, base(h)), h)
    nn.init.constant_(adapter.scale, 0.5)
    adapter(h, base(h)).sum().backward()
    graded = sum(p.grad is not None for p in base.parameters())
    sparse = naive.gap(adapter(h, base(h)), adapter.sparse(h, base(h)))
    other = h.clone()
    other[:, 6:] += 1
    leak = naive.gap(adapter(other, base(other))[:, :6], adapter(h, base(h))[:, :6])
    return max(silent, graded, sparse, leak), naive.gap(adapter(h, base(h)), h)


@check("gin-attention", "two multisets of one mean and different sizes: difference of MLP(sum)", above=1e-2, control="MLP(mean)")
def _() -> tuple[float, float]:
    v = torch.randn(4, dtype=F64).expand(7, 4)
    mlp = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 4)).double()
    a = torch.zeros(7, 7, dtype=F64)
    a[0, :2] = a[1, 2:] = 1  # two neighbours, five neighbours
    total, mean, _, _ = aggregated(a, v).chunk(4, -1)
    return naive.gap(mlp(total[0]), mlp(total[1])), naive.gap(mlp(mean[0]), mlp(mean[1]))
