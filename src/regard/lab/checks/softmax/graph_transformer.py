"""Checks of graph-transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.softmax.graph_transformer import GraphTransformer, GraphTransformerLayer, all_pairs, block_model, laplacian_positions


def graph_layer(edge_stream: bool = False) -> GraphTransformerLayer:
    return GraphTransformerLayer(16, 2, edge_stream).double().eval()


def ring(n: int, first: int = 0) -> Tensor:
    at = torch.arange(n)
    both = torch.cat((torch.stack((at, (at + 1) % n)), torch.stack(((at + 1) % n, at))), 1)
    return both + first


def graph_loops(layer: GraphTransformerLayer, h: Tensor, edges: Tensor, e: Tensor | None, clamp: float = 5.0) -> tuple[Tensor, Tensor]:
    """What nodes gather and the edges' vectors, an edge and a head at a time."""
    heads, d = layer.heads, h.shape[1] // layer.heads
    gathered, vectors = torch.zeros_like(h), torch.zeros(edges.shape[1], h.shape[1], dtype=F64)
    for head in range(heads):
        own = slice(head * d, (head + 1) * d)
        total = torch.zeros(len(h), dtype=F64)
        for n, (j, i) in enumerate(edges.T.tolist()):
            w = (layer.q.weight @ h[i])[own] * (layer.k.weight @ h[j])[own] / math.sqrt(d)
            if e is not None and layer.e is not None:
                w = w * (layer.e.weight @ e[n])[own]
            vectors[n, own] = w
            strength = math.exp(min(max(float(w.sum()), -clamp), clamp))
            total[i] += strength
            gathered[i, own] += strength * (layer.v.weight @ h[j])[own]
        for i in range(len(h)):
            if float(total[i]) > 0:
                gathered[i, own] /= total[i] + (1e-6 if layer.e is not None else 0.0)
    return gathered, vectors


@check(
    "graph-transformer",
    "edges, and the dense masked form, with edge features and logits beyond +-5 == loops over edges, the edges' vectors too",
    below=1e-10,
    control="without edge features",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    layer, h = graph_layer(True), 3 * torch.randn(9, 16, dtype=F64)
    edges = torch.randint(8, (2, 40)).unique(dim=1)  # node 8 stands alone
    e = 3 * torch.randn(9, 9, 16, dtype=F64)
    a = torch.zeros(9, 9, dtype=torch.bool)
    a[edges[1], edges[0]] = True
    given = e[edges[1], edges[0]]
    truth, vectors = graph_loops(layer, h, edges, given)
    gathered, w = layer.attend(h, edges, given)
    free = naive.gap(graph_loops(layer, h, edges, given, math.inf)[0], truth)  # the clamp is at work
    own = max(naive.gap(gathered, truth), naive.gap(w, vectors), naive.gap(layer.attend_dense(h, a, e), truth))
    return own if free > 1e-3 else math.inf, naive.gap(layer.attend(h, edges)[0], truth)


@check(
    "graph-transformer",
    "the layer == norm(x + O branch), then norm(x + W_2 relu(W_1 x)) for nodes and edges, batch and layer norms in loops",
    below=1e-10,
    control="without norms",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    h, edges, e = torch.randn(7, 16, dtype=F64), ring(7), torch.randn(14, 16, dtype=F64)
    own: list[float] = []
    other: list[float] = []
    for norm in ("batch", "layer"):
        layer = GraphTransformerLayer(16, 2, True, norm=norm).double()
        outs = layer(h, edges, e)
        branches = graph_loops(layer, h, edges, e)
        for stream, x, branch, out in zip((layer.nodes, layer.edges), (h, e), branches, outs, strict=True):
            assert stream is not None and out is not None
            for normed, into in ((True, own), (False, other)):

                def scaled(x: Tensor, normed: bool = normed, dim: int = 0 if norm == "batch" else 1) -> Tensor:
                    away = x - x.mean(dim, keepdim=True)
                    return away / (away.square().mean(dim, keepdim=True) + 1e-5).sqrt() if normed else x

                y = scaled(x + branch @ stream.out.weight.T + stream.out.bias)
                hidden = (y @ stream.up.weight.T + stream.up.bias).clamp_min(0)
                into.append(naive.gap(out, scaled(y + hidden @ stream.down.weight.T + stream.down.bias)))
    return max(own), min(other)


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
