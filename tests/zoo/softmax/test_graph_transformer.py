"""The graph transformer: positions, complete graphs, batches, models with readouts by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from regard import RegardError
from regard.zoo.softmax.graph_transformer import GraphTransformer, GraphTransformerLayer, all_pairs, block_model, laplacian_positions


def undirected(n: int) -> Tensor:
    at = torch.arange(n)
    return torch.stack((at, (at + 1) % n))


def test_positions() -> None:
    """The smallest eigenvalues after the first, in order; edges count in both directions; missing ones are 0."""
    edges = torch.cat((undirected(7), torch.tensor([[0], [3]])), 1)
    a = torch.zeros(8, 8, dtype=torch.float64)  # node 7 stands alone
    for i, j in edges.T.tolist():
        a[i, j] = a[j, i] = 1
    degree = [max(1.0, float(row.sum())) for row in a]
    laplacian = torch.tensor(
        [[float(i == j) - float(a[i, j]) / math.sqrt(degree[i] * degree[j]) for j in range(8)] for i in range(8)], dtype=torch.float64
    )
    values = torch.linalg.eigvalsh(laplacian)
    found = laplacian_positions(edges, 8, 5)
    assert found.shape == (8, 5)
    for n in range(5):
        v = found[:, n]
        torch.testing.assert_close(laplacian @ v, values[n + 1] * v, atol=1e-9, rtol=0)
        torch.testing.assert_close(v.norm(), torch.tensor(1.0, dtype=torch.float64))
    wide = laplacian_positions(edges, 8, 10)
    assert wide.shape == (8, 10) and bool((wide[:, 7:] == 0).all()) and bool((wide[:, 6] != 0).any())


def test_signs_are_drawn_in_training() -> None:
    still = laplacian_positions(undirected(9), 9, 6)
    drawn = [laplacian_positions(undirected(9), 9, 6, flip=True) for _ in range(6)]
    signs = torch.stack([(one * still).sum(0) for one in drawn])
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs))
    assert bool((signs > 0).any()) and bool((signs < 0).any())


def test_complete_graphs_one_after_another() -> None:
    found = {tuple(edge) for edge in all_pairs(torch.tensor([2, 3])).T.tolist()}
    assert found == {(i, j) for i in (0, 1) for j in (0, 1)} | {(i, j) for i in (2, 3, 4) for j in (2, 3, 4)}


@torch.no_grad()
def test_the_plain_layer_divides_by_the_sum_alone_and_lonely_nodes_read_nothing() -> None:
    layer, h = GraphTransformerLayer(8, 2, bias=True).double().eval(), torch.randn(4, 8, dtype=torch.float64)
    edges = torch.tensor([[0, 1, 3], [1, 2, 2]])
    gathered, _ = layer.attend(h, edges)
    assert layer.eps == 0 and GraphTransformerLayer(8, 2, True).eps == 1e-6 and GraphTransformerLayer(8, 2, eps=0.5).eps == 0.5
    assert bool((gathered[[0, 3]] == 0).all())
    torch.testing.assert_close(gathered[1], layer.v(h[0]))
    q, k, v = layer.q(h).view(4, 2, 4), layer.k(h).view(4, 2, 4), layer.v(h).view(4, 2, 4)
    for head in range(2):
        p = torch.stack([q[2, head] @ k[j, head] / 2 for j in (1, 3)]).softmax(0)
        torch.testing.assert_close(gathered[2].view(2, 4)[head], p[0] * v[1, head] + p[1] * v[3, head])
    loose = GraphTransformerLayer(8, 2, bias=True, eps=2.0).double().eval()
    loose.load_state_dict(layer.state_dict())
    strength = torch.stack([torch.exp(q[1, head] @ k[0, head] / 2) for head in range(2)])
    torch.testing.assert_close(loose.attend(h, edges)[0][1].view(2, 4), (strength / (strength + 2))[:, None] * v[0])
    a = torch.zeros(4, 4, dtype=torch.bool)
    a[edges[1], edges[0]] = True
    torch.testing.assert_close(loose.attend_dense(h, a), loose.attend(h, edges)[0])


def test_defaults_and_dropout() -> None:
    layer = GraphTransformerLayer(8, 2)
    assert layer.e is None and layer.edges is None and layer.q.bias is None and isinstance(layer.nodes.norm1, nn.BatchNorm1d)
    assert layer.nodes.up.weight.shape == (16, 8) and layer.nodes.dropout.p == 0 and layer.nodes.up.bias is not None
    h, edges = torch.randn(5, 8), undirected(5)
    wild = GraphTransformerLayer(8, 2, True, dropout=0.5, norm="")
    e = torch.randn(5, 8)
    assert not torch.equal(wild(h, edges, e)[0], wild(h, edges, e)[0]) and not torch.equal(wild(h, edges, e)[1], wild(h, edges, e)[1])
    assert layer(h, edges)[1] is None
    nodes, streamed = wild.eval()(h, edges, e)
    assert streamed is not None and nodes.shape == (5, 8) and isinstance(wild.nodes.norm1, nn.Identity)


@pytest.mark.parametrize("readout", ["mean", "sum", ""])
@torch.no_grad()
def test_models(readout: str) -> None:
    model = GraphTransformer(3, 8, 2, 2, 4, positions=2, readout=readout).eval()
    x, place, graph = torch.randn(7, 3), torch.randn(7, 2), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    edges = torch.cat((undirected(3), undirected(4) + 3), 1)
    h = model.embed(x) + model.place(place)
    for layer in model.layers:
        h, _ = layer(h, edges)
    if readout:
        h = torch.stack([h[:3].sum(0), h[3:].sum(0)]) / (torch.tensor([[3.0], [4.0]]) if readout == "mean" else 1)
    first, _, second = model.head
    want = (h @ first.weight.T + first.bias).clamp_min(0) @ second.weight.T + second.bias  # type: ignore[operator, union-attr]
    torch.testing.assert_close(model(x, edges, place, graph), want)
    assert len(model.layers) == 2 and first.weight.shape == (4, 8) and model(x, edges, place).shape == (7, 4)  # type: ignore[union-attr]
    assert len(list(model.layers.parameters())) > 0 and GraphTransformer(3, 8, 2, 1, 4).place.in_features == 8
    assert GraphTransformer(3, 8, 2, 1, 4).readout == "mean"


def test_block_models() -> None:
    x, edges, label = block_model(400, seed=2)
    assert x.shape == (400, 3) and set(label.tolist()) == {0, 1, 2}
    shown = x.sum(-1) > 0
    assert 0.1 < float(shown.double().mean()) < 0.3 and bool((x[shown].argmax(-1) == label[shown]).all()) and bool((x[~shown] == 0).all())
    a = torch.zeros(400, 400)
    a[edges[0], edges[1]] = 1
    assert torch.equal(a, a.T) and bool((a.diagonal() == 1).all())
    off = ~torch.eye(400, dtype=torch.bool)
    same = label[:, None] == label
    assert float(a[same & off].mean()) == pytest.approx(0.6, abs=0.03) and float(a[~same].mean()) == pytest.approx(0.1, abs=0.02)
    assert torch.equal(block_model(50)[1], block_model(50, 3, 0.6, 0.1, 0.2, 0)[1]) and torch.equal(
        block_model(50)[0], block_model(50, hint=0.2)[0]
    )
    other = block_model(300, blocks=2, inside=0.9, across=0.5, hint=1.0)
    assert other[0].shape == (300, 2) and bool((other[0].sum(-1) == 1).all())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GraphTransformerLayer(9, 2), "multiple of heads"),
        (lambda: GraphTransformerLayer(8, 2, norm="rms"), "batch, layer"),
        (lambda: GraphTransformerLayer(8, 2, True)(torch.ones(2, 8), undirected(2)), "features are missing"),
        (lambda: GraphTransformerLayer(8, 2)(torch.ones(2, 8), undirected(2), torch.ones(2, 8)), "features are given"),
        (lambda: GraphTransformer(3, 8, 2, 1, 4, readout="max"), "mean, sum"),
    ],
)
def test_says_what_is_wrong(make: object, words: str) -> None:
    with pytest.raises(RegardError, match=words):
        make()  # type: ignore[operator]
