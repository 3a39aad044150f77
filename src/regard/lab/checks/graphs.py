"""Checks of attention on graphs: isomorphic attention and the graph transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...algebra import Causal
from ...engine import attend
from ...nn import GINAttention, GraphTransformer, GraphTransformerLayer, SparseGINAdapter, laplacian_positions
from ...nn.graph_transformer import all_pairs, block_model
from ...nn.isomorphic import Adjacency, aggregated
from .. import naive
from ..verification import check

F64 = torch.float64


def gathered(a: Tensor, v: Tensor) -> Tensor:
    """PNA's four aggregations a node at a time."""
    rows = []
    for i in range(a.shape[0]):
        degree = float(a[i].detach().sum()) or 1.0
        near = [j for j in range(a.shape[0]) if a[i, j] > 0]
        total = sum((a[i, j] * v[j] for j in range(a.shape[0])), torch.zeros_like(v[0]))
        squares = sum((a[i, j] * v[j] ** 2 for j in range(a.shape[0])), torch.zeros_like(v[0]))
        largest = torch.stack([v[j] for j in near]).amax(0) if near else torch.zeros_like(v[0])
        rows.append(torch.cat((total, total / degree, largest, (squares / degree - (total / degree) ** 2).clamp_min(0))))
    return torch.stack(rows)


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


def graph_layer(edge_stream: bool = False) -> GraphTransformerLayer:
    return GraphTransformerLayer(16, 2, edge_stream).double().eval()


def ring(n: int, first: int = 0) -> Tensor:
    at = torch.arange(n)
    both = torch.cat((torch.stack((at, (at + 1) % n)), torch.stack(((at + 1) % n, at))), 1)
    return both + first


@check("graph-transformer", "edges == the dense masked form, with edge features", below=1e-10, control="edges turned round")
def _() -> tuple[float, float]:
    layer, h = graph_layer(True), torch.randn(9, 16, dtype=F64)
    edges = torch.randint(9, (2, 40)).unique(dim=1)
    e = torch.randn(9, 9, 16, dtype=F64)
    a = torch.zeros(9, 9, dtype=torch.bool)
    a[edges[1], edges[0]] = True
    sparse = layer.attend(h, edges, e[edges[1], edges[0]])[0]
    return naive.gap(sparse, layer.attend_dense(h, a, e)), naive.gap(sparse, layer.attend_dense(h, a.T, e))


@check("graph-transformer", "a complete graph == softmax attention", below=1e-5, control="a ring")
def _() -> tuple[float, float]:
    layer, h = graph_layer(), torch.randn(9, 16, dtype=F64)
    q, k, v = (layer.split(one(h)).transpose(0, 1)[None] for one in (layer.q, layer.k, layer.v))
    truth = attend(q, k, v)[0].transpose(0, 1).flatten(-2)
    return naive.gap(layer.attend(h, all_pairs(torch.tensor([9])))[0], truth), naive.gap(layer.attend(h, ring(9))[0], truth)


@check(
    "graph-transformer",
    "permuting nodes permutes outputs, and graphs of one batch do not meet",
    below=1e-10,
    control="an edge between them",
)
def _() -> tuple[float, float]:
    layer, h = graph_layer(), torch.randn(12, 16, dtype=F64)
    edges = torch.cat((ring(5), ring(7, 5)), 1)
    out, order = layer(h, edges)[0], torch.randperm(12)
    place = order.argsort()
    permuted = naive.gap(layer(h[order], place[edges])[0], out[order])
    other = h.clone()
    other[5:] += 1
    apart = naive.gap(layer(other, edges)[0][:5], out[:5])
    bridge = torch.cat((edges, torch.tensor([[6], [0]])), 1)
    return max(permuted, apart), naive.gap(layer(other, bridge)[0][:5], layer(h, bridge)[0][:5])


@check("graph-transformer", "positions are eigenvectors of the Laplacian: |L v - lambda v|", below=1e-8, control="random vectors")
def _() -> tuple[float, float]:
    edges = torch.cat((ring(9), torch.tensor([[0, 2], [4, 7]])), 1)
    a = torch.zeros(9, 9, dtype=F64)
    a[edges[0], edges[1]] = a[edges[1], edges[0]] = 1
    side = a.sum(-1).rsqrt()
    laplacian = torch.eye(9, dtype=F64) - side[:, None] * a * side

    def off(v: Tensor) -> float:
        value = (v * (laplacian @ v)).sum(0) / v.square().sum(0)
        return naive.gap(laplacian @ v, value * v)

    return off(laplacian_positions(edges, 9, 4)), off(torch.randn(9, 4, dtype=F64))


@check(
    "graph-transformer",
    "blocks of a stochastic block model, a fifth of them shown: accuracy on hidden nodes",
    above=0.9,
    control="self loops alone",
)
def _() -> tuple[float, float]:
    def accuracy(alone: bool) -> float:
        torch.manual_seed(0)
        x, edges, label = block_model(120)
        used = edges[:, edges[0] == edges[1]] if alone else edges
        place = laplacian_positions(edges, 120, 4).float() * (not alone)
        model = GraphTransformer(3, 32, 4, 2, 3, positions=4, readout="")
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        hidden = x.sum(-1) == 0
        for _ in range(60):
            left_out = ~hidden & (torch.rand(120) < 0.5)  # a node's own label must come from its neighbours
            given = torch.where(left_out[:, None], 0.0, x)
            loss = nn.functional.cross_entropy(model(given, used, place)[left_out], label[left_out])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        return float((model(x, used, place).argmax(-1) == label)[hidden].float().mean())

    return accuracy(False), accuracy(True)
