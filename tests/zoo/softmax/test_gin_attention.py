"""Graph-aware attention in loops: adjacencies and what is made of them, GIN, PNA, the sparse adapter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from regard import RegardError
from regard.zoo.softmax.gin_attention import Adjacency, GINAttention, GraphAdapted, HeadMLP, PNAAttention, SparseGINAdapter, aggregated

PROCESS = {
    "none": lambda a, t, b: a,
    "relu": lambda a, t, b: max(a - t, 0.0),
    "silu": lambda a, t, b: (a - t) / (1 + math.exp(t - a)),
    "softplus": lambda a, t, b: math.log1p(math.exp(a - t)),
    "sharp_softplus": lambda a, t, b: math.log1p(math.exp(b * (a - t))) / b,
    "sigmoid": lambda a, t, b: 1 / (1 + math.exp(-b * (a - t))),
    "binary": lambda a, t, b: float(a > t),
}


@torch.no_grad()
def raw_maps(layer: Adjacency, x: Tensor, factor: float) -> Tensor:
    """(maps, H, n, n) before any processing."""
    n, d = len(x), x.shape[1] // layer.heads
    q, k = (w(x).view(n, -1, layer.heads, d) for w in (layer.q, layer.k))
    out = torch.zeros(q.shape[1], layer.heads, n, n, dtype=torch.float64)
    for m in range(q.shape[1]):
        for h in range(layer.heads):
            for i in range(n):
                if layer.pair is None:
                    s = torch.stack([q[i, m, h] @ k[j, m, h] * factor / math.sqrt(d) for j in range(i + 1)])
                else:
                    both = [q[i, m, h] + k[j, m, h] for j in range(i + 1)]
                    s = torch.stack([layer.pair[h] @ (z / (1 + torch.exp(-z))) for z in both])
                out[m, h, i, : i + 1] = s if layer.kind == "raw" else s.softmax(0)
    return out


@pytest.mark.parametrize("kind", ["softmax", "raw", "mlp"])
@pytest.mark.parametrize("differential", [False, True])
def test_adjacency(kind: str, differential: bool) -> None:
    layer = Adjacency(8, 2, kind, sharpen=3.0, temperature=2.0, differential=differential, depth=2).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    for b in range(2):
        maps = raw_maps(layer, x[b], 1.5)
        want = maps[0] - layer.lam * maps[1] if layer.lam is not None else maps[0]
        torch.testing.assert_close(layer(x)[b], want)
    assert (layer.lam is not None) == differential
    if layer.lam is not None:
        torch.testing.assert_close(layer.lam, torch.full((2, 1, 1), 0.8 - 0.6 * math.exp(-0.6), dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("process", [*PROCESS, "top_k"])
def test_what_is_made_of_it(process: str) -> None:
    given: dict[str, float] = {} if process in ("softplus", "relu") else {"threshold": 0.15, "beta": 7.0}
    layer = Adjacency(8, 2, process=process, **({"top_k": 3} if process == "top_k" else given)).double()  # type: ignore[arg-type]
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    maps = raw_maps(layer, x[0], 1.0)[0]
    want = torch.zeros_like(maps)
    for h in range(2):
        for i in range(6):
            row = maps[h, i].tolist()
            best = sorted(row, reverse=True)[:3]
            for j in range(i + 1):
                if process == "top_k":
                    want[h, i, j] = row[j] if row[j] in best else 0.0
                else:
                    want[h, i, j] = PROCESS[process](row[j], given.get("threshold", 0.2), given.get("beta", 10.0))
    torch.testing.assert_close(layer(x)[0], want)


def test_defaults_of_adjacencies() -> None:
    layer = Adjacency(8, 2)
    assert (layer.kind, layer.process, layer.threshold, layer.beta, layer.top_k, layer.factor) == ("softmax", "none", 0.2, 10.0, 8, 1.0)
    assert layer.pair is None and layer.lam is None and layer.q.bias is None and layer.k.bias is None
    first = Adjacency(8, 2, differential=True).lam
    assert first is not None and float(first.detach()[0]) == pytest.approx(0.2, abs=1e-6)
    pair = Adjacency(256, 4, "mlp").pair
    assert pair is not None and pair.shape == (4, 64) and float(pair.detach().std()) == pytest.approx(1 / 8, rel=0.2)


@torch.no_grad()
def network(mlp: HeadMLP, y: Tensor) -> Tensor:
    """(H, n, inputs) -> (H, n, outputs): RMSNorm and SiLU between two matrices of a head."""
    out = []
    for h, part in enumerate(y):
        z = part @ mlp.up[h]
        z = mlp.norm.weight * z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        out.append((z / (1 + torch.exp(-z))) @ mlp.down[h])
    return torch.stack(out)


@pytest.mark.parametrize("paper", [False, True])
@torch.no_grad()
def test_gin(paper: bool) -> None:
    layer, x = GINAttention(8, 2, paper=paper, process="relu").double(), torch.randn(1, 6, 8, dtype=torch.float64)
    assert (
        float(layer.eps) == 0 and isinstance(layer.mlp, HeadMLP) and layer.mlp.up.shape == (2, 4, 8) and layer.mlp.down.shape == (2, 8, 4)
    )
    layer.eps.fill_(0.3)
    nn.init.normal_(layer.mlp.norm.weight)
    a, own = layer.adjacency(x)[0], x[0].view(6, 2, 4).transpose(0, 1)
    mixed = (1.3 if paper else 0.3) * own + a @ own
    torch.testing.assert_close(layer(x)[0], layer.out(network(layer.mlp, mixed).transpose(0, 1).flatten(1)))


@pytest.mark.parametrize("kind", ["softmax", "raw"])
@torch.no_grad()
def test_pna(kind: str) -> None:
    layer, x = PNAAttention(8, 2, kind=kind).double(), torch.randn(1, 6, 8, dtype=torch.float64)
    assert layer.mlp.up.shape == (2, 16, 8) and layer.mlp.down.shape == (2, 8, 4)
    a, v = layer.adjacency(x)[0], layer.v(x[0]).view(6, 2, 4).transpose(0, 1)
    a = a.clamp_min(0) if kind == "raw" else a
    gathered = torch.zeros(2, 6, 16, dtype=torch.float64)
    for h in range(2):
        for i in range(6):
            near = [j for j in range(6) if a[h, i, j] > 0]
            degree = float(a[h, i].sum()) or 1.0
            total = sum((a[h, i, j] * v[h, j] for j in near), torch.zeros(4, dtype=torch.float64))
            squares = sum((a[h, i, j] * v[h, j] ** 2 for j in near), torch.zeros(4, dtype=torch.float64))
            largest = torch.stack([v[h, j] for j in near]).amax(0) if near else torch.zeros(4)
            gathered[h, i] = torch.cat((total, total / degree, largest, (squares / degree - (total / degree) ** 2).clamp_min(0)))
    torch.testing.assert_close(layer(x)[0], layer.out(network(layer.mlp, gathered).transpose(0, 1).flatten(1)))


def test_signed_weights_that_cancel_divide_by_one() -> None:
    a, v = torch.tensor([[1.0, -1.0]], dtype=torch.float64), torch.tensor([[3.0], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(aggregated(a, v), torch.tensor([[2.0, 2.0, 3.0, 4.0]], dtype=torch.float64))


def test_networks_of_heads_start_at_unit_scale_and_drop_in_training() -> None:
    mlp = HeadMLP(2, 64, 256, 32, dropout=0.5)
    assert float(mlp.up.detach().std()) == pytest.approx(1 / 8, rel=0.05) and float(mlp.down.detach().std()) == pytest.approx(
        1 / 16, rel=0.05
    )
    x = torch.randn(1, 2, 3, 64)
    assert not torch.equal(mlp(x), mlp(x)) and torch.equal(mlp.eval()(x), mlp(x)) and HeadMLP(2, 4, 4, 4).dropout.p == 0


@pytest.mark.parametrize(
    "options", [{}, {"mean": True}, {"kappa": 4.0}, {"kappa": 4.0, "threshold": 0.5, "floor": 0.3}, {"self_loops": False, "floor": 0.2}]
)
@torch.no_grad()
def test_the_adapter(options: dict[str, float]) -> None:
    adapter = SparseGINAdapter(8, **({"scale": 0.7} | options)).double()  # type: ignore[arg-type]
    adapter.eps.fill_(0.4)
    nn.init.normal_(adapter.norm.weight)
    h, maps = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 3, 5, 5, dtype=torch.float64).softmax(-1)
    found = [adapter(h, maps), adapter.sparse(h, maps)]
    for b in range(2):
        gathered = torch.zeros(5, 8, dtype=torch.float64)
        for i in range(5):
            for j in range(i + (1 if options.get("self_loops", True) else 0)):
                edge = sum(float(maps[b, m, i, j]) for m in range(3))
                edge = edge / 3 if options.get("mean") else min(edge, 1.0)
                if "kappa" in options:
                    edge = 1 / (1 + math.exp(-4.0 * (edge - options.get("threshold", 0.2))))
                gathered[i] += (0.0 if edge < options.get("floor", 1e-3) else edge) * h[b, j]
        z = 0.4 * h[b] + gathered
        z = h[b] + 0.7 * adapter.norm.weight * z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        up, _, down = adapter.mlp
        hidden = z @ up.weight.T + up.bias  # type: ignore[operator, union-attr]
        want = z + 0.7 * ((hidden / (1 + torch.exp(-hidden))) @ down.weight.T + down.bias)  # type: ignore[operator, union-attr]
        for one in found:
            torch.testing.assert_close(one[b], want)


def test_an_adapter_starts_silent_and_teaches_the_layer_before_it_nothing() -> None:
    adapter, maps = SparseGINAdapter(8), torch.rand(1, 2, 5, 5, requires_grad=True)
    assert float(adapter.scale.detach()) == 0 and float(adapter.eps.detach()) == 0 and not adapter.mean and adapter.kappa is None
    h = torch.randn(1, 5, 8)
    assert torch.equal(adapter(h, maps), h)
    nn.init.ones_(adapter.scale)
    adapter(h, maps).sum().backward()
    assert maps.grad is None and adapter.scale.grad is not None


@pytest.mark.parametrize("paper", [False, True])
@torch.no_grad()
def test_gin_without_a_projection_and_with_a_network_of_the_caller(paper: bool) -> None:
    layer, x = (
        GINAttention(8, 2, paper=paper, project=False, mlp=nn.Tanh(), kind="raw", sharpen=2.0).double(),
        torch.randn(2, 6, 8).double(),
    )
    assert layer.adjacency.kind == "raw" and layer.adjacency.factor == 2.0 and isinstance(layer.out, nn.Identity)
    layer.eps.fill_(-0.3)
    own = x.unflatten(-1, (2, 4)).transpose(1, 2)
    want = torch.tanh((0.7 if paper else -0.3) * own + layer.adjacency(x) @ own)
    torch.testing.assert_close(layer(x), want.transpose(1, 2).flatten(-2))
    assert PNAAttention(8, 2, process="relu").adjacency.process == "relu"


def test_a_frozen_decoder_of_transformers_with_adapters() -> None:
    pytest.importorskip("transformers")
    from regard.adapt.host import cache_argument
    from regard.lab.checks.shared.decoding import llama

    model, ids = llama(), torch.randint(1, 50, (1, 5))
    model.set_attn_implementation("eager")
    plain = model(ids, use_cache=False).logits
    adapted = GraphAdapted(model, 32, mean=True, scale=0.1)
    assert [*adapted.adapters] == ["0", "1"] and all(
        one.mean and one.norm.weight.dtype == torch.float64 for one in adapted.adapters.values()
    )
    assert {name.split(".")[0] for name, p in adapted.named_parameters() if p.requires_grad} == {"adapters"}
    assert not torch.allclose(adapted(ids, use_cache=False).logits, plain)
    for one in adapted.adapters.values():
        nn.init.zeros_(one.scale)
    torch.testing.assert_close(adapted(ids, use_cache=False).logits, plain)
    cache = adapted(ids, use_cache=True).past_key_values
    with pytest.raises(RegardError, match="use_cache=False"):
        adapted(ids[:, :1], **{cache_argument(model): cache})
    for layers in ([], [-1], [2]):
        with pytest.raises(RegardError, match="expected some of 0"):
            GraphAdapted(model, 32, layers=layers)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Adjacency(8, 2, "cosine"), "softmax, raw or mlp"),
        (lambda: Adjacency(8, 2, process="tanh"), "sharp_softplus"),
        (lambda: Adjacency(8, 3), "multiple of heads"),
    ],
)
def test_says_what_is_wrong(make: object, words: str) -> None:
    with pytest.raises(RegardError, match=words):
        make()  # type: ignore[operator]
