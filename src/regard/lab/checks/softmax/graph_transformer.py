"""Checks of graph-transformer."""

from __future__ import annotations

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
