"""Dual attention in loops: both kinds of heads, symbols of tokens, positions and pairs, the baselines, the games."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from regard import RegardError
from regard.zoo.softmax.dat import (
    DualAttention,
    DualBlock,
    DualDecoder,
    DualViT,
    PositionalSymbols,
    RelationalAttention,
    RelationalCrossAttention,
    RelativeSymbols,
    SymbolicAttention,
    relational_games,
)


def rotated(y: Tensor, position: int) -> Tensor:
    """Rotary positions on halves, base 10000."""
    half = len(y) // 2
    angle = torch.tensor([position / 10000 ** (c / half) for c in range(half)], dtype=torch.float64)
    a, b = y[:half], y[half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))


@torch.no_grad()
def by_hand(layer: RelationalAttention, x: Tensor, symbol: object) -> Tensor:
    """Heads, queries, keys and relations; symbol(i, j) is what query i reads of key j."""
    n, d, r, group = len(x), layer.width, layer.relation_dim, layer.heads // layer.kv_heads
    q, k, qr = layer.q(x), layer.k(x), layer.q_rel(x)
    kr = qr if layer.k_rel is None else layer.k_rel(x)
    out = torch.zeros(n, layer.heads * d, dtype=torch.float64)
    for h in range(layer.heads):
        for i in range(n):
            last, g = (i + 1 if layer.causal else n), h // group
            own, shared = slice(h * d, h * d + d), slice(g * d, g * d + d)
            queries, keys = q[i, own], [k[j, shared] for j in range(last)]
            if layer.rope is not None:
                queries, keys = rotated(queries, i), [rotated(key, j) for j, key in enumerate(keys)]
            alpha = torch.stack([queries @ key / math.sqrt(d) for key in keys]).softmax(0)
            for j in range(last):
                rel = torch.stack([qr[i, p * r : p * r + r] @ kr[j, p * r : p * r + r] / math.sqrt(r) for p in range(layer.relations)])
                rel = rel if layer.activation is None else layer.activation(rel)
                out[i, own] += alpha[j] * (layer.w_r[h] @ rel + layer.v(symbol(i, j))[shared])  # type: ignore[operator]
    return out


OPTIONS: list[dict[str, object]] = [
    {},
    {"relations": 2, "kv_heads": 2, "bias": True},
    {"symmetric": True, "causal": False},
    {"activation": torch.tanh, "rope": True},
    {"rope": True, "kv_heads": 1, "relations": 8},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_relational_heads(options: dict[str, object]) -> None:
    layer = RelationalAttention(12, 4, 4, **options).double()  # type: ignore[arg-type]
    x, symbols = torch.randn(2, 6, 12, dtype=torch.float64), torch.randn(2, 6, 12, dtype=torch.float64)
    for b in range(2):
        torch.testing.assert_close(layer(x, symbols)[b], by_hand(layer, x[b], lambda i, j, b=b: symbols[b, j]))
    positions = PositionalSymbols(12, 9).double()
    for b in range(2):
        torch.testing.assert_close(layer(x, positions(6))[b], by_hand(layer, x[b], lambda i, j: positions.library[j]))
    pairs = RelativeSymbols(12, 3).double()
    for b in range(2):
        want = by_hand(layer, x[b], lambda i, j: pairs.library[min(max(i - j, -3), 3) + 3])
        torch.testing.assert_close(layer(x, pairs(6, 6), relative=True)[b], want)
        torch.testing.assert_close(layer(x, pairs.library, relative=True)[b], want)
    with pytest.raises(RegardError, match="odd"):
        layer(x, pairs.library[:-1], relative=True)


@pytest.mark.parametrize("options", [one for one in OPTIONS if "activation" not in one and one.get("causal", True)])
def test_dual_attention_and_its_steps(options: dict[str, object]) -> None:
    layer = DualAttention(24, 2, 4, **options).double()  # type: ignore[arg-type]
    x, symbols = torch.randn(2, 7, 24, dtype=torch.float64), torch.randn(2, 7, 24, dtype=torch.float64)
    whole = layer(x, symbols)
    q, k, v = (w(x).unflatten(-1, (-1, 4)).transpose(1, 2) for w in (layer.sensory.q, layer.sensory.k, layer.sensory.v))
    if layer.sensory.rope is not None:
        q, k = (torch.stack([torch.stack([torch.stack([rotated(t, at) for at, t in enumerate(h)]) for h in b]) for b in y]) for y in (q, k))
    k, v = (y.repeat_interleave(2 // y.shape[1], 1) for y in (k, v))
    sensed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2) @ layer.sensory.out.weight.T
    related = torch.stack([by_hand(layer.relational, x[b], lambda i, j, b=b: symbols[b, j]) for b in range(2)])
    torch.testing.assert_close(whole, torch.cat((sensed, layer.out(related)), -1))
    assert layer.sensory.out.weight.shape == (8, 8) and layer.out.weight.shape == (16, 16)
    assert layer.sensory.out.bias is None and (layer.out.bias is not None) == bool(options.get("bias", False))
    state, outs = None, []
    for a, b in ((0, 1), (1, 3), (3, 7)):
        y, state = layer.step(x[:, a:b], symbols[:, a:b], state)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), whole)


def test_dual_attention_with_symbols_of_pairs_in_both_directions() -> None:
    layer, x = DualAttention(16, 2, 2, causal=False).double(), torch.randn(1, 5, 16, dtype=torch.float64)
    pairs = RelativeSymbols(16).double()
    related = by_hand(layer.relational, x[0], lambda i, j: pairs.library[i - j + 64])
    torch.testing.assert_close(layer(x, pairs(5, 5), relative=True)[0, :, 8:], layer.out(related))
    assert not layer.sensory.causal and not layer.relational.causal and DualAttention(16, 2, 2).relational.causal


@pytest.mark.parametrize("disentangled", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_relational_cross_attention(disentangled: bool, causal: bool) -> None:
    for options in ({}, {"kv_heads": 2, "bias": True, "activation": torch.tanh}):
        layer = RelationalCrossAttention(12, 4, disentangled=disentangled, causal=causal, **options).double()
        x, symbols = torch.randn(1, 6, 12, dtype=torch.float64), torch.randn(1, 6, 12, dtype=torch.float64)
        q, k, v = layer.q(x[0]), layer.k(x[0]), layer.v(symbols[0])
        out = torch.zeros(6, 12, dtype=torch.float64)
        for h in range(4):
            own, g = slice(3 * h, 3 * h + 3), h // (4 // layer.kv_heads)
            shared = slice(3 * g, 3 * g + 3)
            for i in range(6):
                last = i + 1 if causal else 6
                alpha = (k[:last, shared] @ q[i, own] / math.sqrt(3)).softmax(0)
                if layer.q_rel is not None and layer.k_rel is not None:
                    r = layer.k_rel(x[0])[:last, shared] @ layer.q_rel(x[0])[i, own] / math.sqrt(3)
                    alpha = alpha * (torch.tanh(r) if options else r.clamp_min(0))
                out[i, own] = alpha @ v[:last, shared]
        torch.testing.assert_close(layer(x, symbols)[0], layer.out(out))


@torch.no_grad()
def test_symbols() -> None:
    for heads, bias in ((4, False), (2, True)):
        layer, x = SymbolicAttention(8, 5, heads, bias).double(), torch.randn(2, 3, 8, dtype=torch.float64)
        d, out = 8 // heads, torch.zeros(2, 3, 8, dtype=torch.float64)
        for h in range(heads):
            own = slice(h * d, h * d + d)
            p = (layer.q(x)[..., own] @ layer.templates[:, own].T / math.sqrt(d)).softmax(-1)
            out[..., own] = p @ layer.library[:, own]
        torch.testing.assert_close(layer(x), out)
        assert (layer.q.bias is not None) == bias
    assert SymbolicAttention(8).templates.shape == (32, 8) and SymbolicAttention(8).heads == 4 and SymbolicAttention(8).q.bias is None
    places = PositionalSymbols(8)
    assert (
        places.library.shape == (1024, 8) and torch.equal(places(3, 2), places.library[2:5]) and torch.equal(places(3), places.library[:3])
    )
    pairs = RelativeSymbols(8)
    assert pairs.library.shape == (129, 8) and pairs(2, 5).shape == (2, 5, 8)
    assert torch.equal(pairs(2, 5)[0, 0], pairs.library[64 + 3]) and torch.equal(pairs(2, 5)[1, 4], pairs.library[64])


def test_relations_start_at_the_scale_of_their_number() -> None:
    assert float(RelationalAttention(64, 16, 16).w_r.detach().std()) == pytest.approx(1 / 4, rel=0.05)
    layer = RelationalAttention(12, 4, 4)
    assert layer.relations == 4 and layer.relation_dim == 4 and layer.k_rel is not None and layer.k.bias is None and layer.v.bias is None


@pytest.mark.parametrize("kind", ["same", "occurs", "between"])
def test_games(kind: str) -> None:
    x, y = relational_games(kind, 300, objects=5)
    assert x.shape == (300, 5, 8) and set(y.tolist()) == {0, 1} and 0.3 < float(y.double().mean()) < 0.8
    for objects, label in zip(x.tolist(), y.tolist(), strict=True):
        assert all(sum(one[:4]) == sum(one[4:]) == 1 for one in objects)
        same = objects[0] == objects[1]
        want = {"same": same, "occurs": objects[0] in objects[1:], "between": objects[1] == objects[2] == objects[3]}[kind]
        assert label == int(want)
    again, other = relational_games(kind, 300)[0], relational_games(kind, 300, seed=1)[0]
    assert torch.equal(x, again) and not torch.equal(x, other)
    if kind == "occurs":  # where the first occurs again is drawn
        places = {row[1:].index(row[0]) for row in relational_games(kind, 300, seed=3)[0].tolist() if row[0] in row[1:]}
        assert len(places) > 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RelationalAttention(12, 4, 4, kv_heads=3), "kv_heads=3 to divide heads"),
        (lambda: RelationalAttention(12, 4, 4, relations=3), "relations=3"),
        (
            lambda: RelationalAttention(12, 2, 4, activation=torch.relu).step(torch.ones(1, 1, 12), torch.ones(1, 1, 12), None, 0),
            "activation=None",
        ),
        (lambda: RelationalCrossAttention(10, 4), "heads to divide dim"),
        (lambda: RelationalCrossAttention(12, 4, kv_heads=3), "kv_heads to divide heads"),
        (lambda: DualAttention(10, 2, 2), "whose sum divides dim"),
        (lambda: DualAttention(12, 0, 4), "heads of both kinds"),
        (lambda: DualAttention(12, 4, 0), "heads of both kinds"),
        (lambda: relational_games("equal", 3), "same, occurs or between"),
        (lambda: relational_games("same", 3, objects=2), "at least 3 objects"),
    ],
)
def test_says_what_is_wrong(make: object, words: str) -> None:
    with pytest.raises(RegardError, match=words):
        make()  # type: ignore[operator]
    relational_games("same", 3, objects=3)


@pytest.mark.parametrize("kind", ["attention", "position", "relative"])
def test_blocks_and_models_by_hand(kind: str) -> None:
    torch.manual_seed(0)
    model = DualDecoder(11, dim=16, layers=2, heads_sa=1, heads_ra=1, symbols=kind, count=3, max_len=9).double()
    tokens = torch.randint(11, (2, 6))
    x = model.embed.weight[tokens]
    for block in model.stack.blocks:
        told = {"attention": lambda: model.stack.library(x), "position": lambda: model.stack.library.library[:6]}.get(kind)
        s = model.stack.library.library if told is None else told()
        y = nn.functional.layer_norm(x, (16,), block.norm1.weight, block.norm1.bias)
        x = x + torch.cat((block.dual.sensory(y), block.dual.out(block.dual.relational(y, s, kind == "relative"))), -1)
        y = nn.functional.layer_norm(x, (16,), block.norm2.weight, block.norm2.bias)
        h = y @ block.mlp[0].weight.T + block.mlp[0].bias
        x = x + (h * (1 + torch.erf(h / math.sqrt(2))) / 2) @ block.mlp[2].weight.T + block.mlp[2].bias
    want = nn.functional.layer_norm(x, (16,), model.stack.norm.weight, model.stack.norm.bias) @ model.embed.weight.T
    torch.testing.assert_close(model(tokens), want)
    torch.testing.assert_close(model(tokens[:, :4]), want[:, :4])
    assert model.stack.blocks[0].mlp[0].out_features == 64 and model.stack.blocks[0].dual.sensory.rope is not None
    model(tokens).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    if kind == "position":
        with pytest.raises(RegardError, match="max_len"):
            model(torch.zeros(1, 10, dtype=torch.long))


def test_blocks_drop_both_branches_in_training_alone() -> None:
    block, x, symbols = DualBlock(16, 1, 1, hidden=5, dropout=0.5).double(), *(torch.randn(2, 6, 16, dtype=torch.float64) for _ in range(2))
    assert block.mlp[0].out_features == block.mlp[2].in_features == 5 and DualBlock(16, 1, 1).drop.p == 0
    for training in (True, False):
        block.train(training)
        torch.manual_seed(1)
        found = block(x, symbols)
        torch.manual_seed(1)
        y = x + nn.functional.dropout(block.dual(block.norm1(x), symbols), 0.5, training)
        torch.testing.assert_close(found, y + nn.functional.dropout(block.mlp(block.norm2(y)), 0.5, training))


@pytest.mark.parametrize("kind", ["attention", "position", "relative"])
def test_options_reach_every_block_of_both_models(kind: str) -> None:
    given = {"dim": 24, "layers": 3, "heads_sa": 1, "heads_ra": 2, "symbols": kind, "count": 5, "hidden": 7, "relations": 4, "bias": True}
    for model in (DualDecoder(9, max_len=11, **given), DualViT(2, 6, 2, **given)):  # type: ignore[arg-type]
        library = model.stack.library
        held = {"attention": lambda one: one.templates, "position": lambda one: one.library, "relative": lambda one: one.library}[kind](
            library
        )
        longest = 11 if isinstance(model, DualDecoder) else 10  # nine patches and the class token
        assert held.shape == ({"attention": 5, "position": longest, "relative": 11}[kind], 24) and getattr(library, "heads", 3) == 3
        assert [block.mlp[0].out_features for block in model.stack.blocks] == [7, 7, 7]
        for block in model.stack.blocks:
            assert block.dual.relational.relations == 4 and block.dual.relational.k.bias is not None and block.dual.out.bias is not None
            assert (block.dual.sensory.rope is not None) == isinstance(model, DualDecoder) == block.dual.relational.causal
    assert DualViT(2, 6, 2, dim=24, heads_sa=1, heads_ra=2).patches.in_channels == 3
    out = DualViT(2, 6, 2, **given)(torch.randn(2, 3, 6, 6))  # type: ignore[arg-type]
    assert out.shape == (2, 2) and bool(out.isfinite().all())


def test_images() -> None:
    torch.manual_seed(0)
    model = DualViT(5, 8, 4, channels=1, dim=16, layers=1, heads_sa=1, heads_ra=1, count=4).double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    rows = []
    for image in x:
        cells = [image[:, a : a + 4, b : b + 4] for a in (0, 4) for b in (0, 4)]
        flat = torch.stack([(model.patches.weight * cell).sum((1, 2, 3)) + model.patches.bias for cell in cells])
        rows.append(torch.cat((model.first[0], flat)) + model.places)
    want = model.head(model.stack(torch.stack(rows))[:, 0])
    torch.testing.assert_close(model(x), want)
    assert not model.stack.blocks[0].dual.sensory.causal and not model.stack.blocks[0].dual.relational.causal
    for bad, message in (
        (lambda: DualViT(5, 9, 4), "divides the side"),
        (lambda: model(x[..., :4]), "expected 4"),
        (lambda: DualDecoder(3, symbols="x"), "symbols='x'"),
    ):
        with pytest.raises(RegardError, match=message):
            bad()
