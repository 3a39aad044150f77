"""Executors against the reference: scores, positions, masks, user functions, merges, statistics, streams."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import regard
from regard import Additive, Alibi, Causal, Cosine, Distance, RelativeBias, Rope, RowLocal, Segments, Sinks, Weighted, Window
from regard.algebra import Hybrid, Input, Modified, PerHead, Selection, Sinkhorn, softmax_plus
from regard.algebra.select import Chosen

MECHANISMS = {
    "softmax": Weighted(),
    "sink": Weighted(normalizer=softmax_plus()),
    "softplus": Weighted(normalizer=RowLocal(F.softplus)),
    "alibi": Weighted(position=Alibi()),
    "relative": Weighted(position=RelativeBias(reach=5)),
    "cosine": Weighted(score=Cosine()),
    "distance": Weighted(score=Distance(link="log")),
    "l2": Weighted(score=Distance(3.0)),
    "additive": Weighted(score=Additive()),
    "rope": Weighted(position=Rope()),
    "interleaved": Weighted(position=Rope(dims=4, interleaved=True)),
    "user score": Weighted(score=lambda q, k: (q @ k.transpose(-1, -2)).tanh()),
    "user position": Weighted(position=lambda s, i, j: s * torch.cos(0.1 * (i - j))),
    "counted": Weighted(normalizer=RowLocal(lambda s, n: torch.relu(s) / n.sqrt())),
    "python branch": Weighted(normalizer=RowLocal(lambda s: s.erfc())),
    "sparsemax": regard.get("sparsemax"),
    "entmax": regard.get("entmax"),
}
MASKS = {
    "full": None,
    "causal": Causal(),
    "window": Causal() & (Window(9) | Sinks(2)),
    "heads": PerHead((Causal(), Window(6))),
    "user": lambda b, h, i, j: (i + j) % 3 == 0,
}


def inputs_of(mechanism, heads=4):
    made = {
        "sink": torch.randn(heads),
        "table": torch.randn(heads, 11),
        "slopes": torch.rand(heads),
        "direction": torch.randn(heads, 8),
        "temperature": 1 + torch.rand(heads),
        "alpha": 1.3 + torch.rand(heads) / 2,
    }
    return {item.name: made[item.name].double().requires_grad_() for item in mechanism.declared if item.name in made}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", MECHANISMS)
def test_tiled_equals_reference(name, mask):
    mechanism = MECHANISMS[name]
    for q_len, k_len in ((150, 150), (20, 150)):
        q, k, v = (
            torch.randn(2, h, n, d, dtype=torch.float64, requires_grad=True) for h, n, d in ((4, q_len, 8), (2, k_len, 8), (2, k_len, 6))
        )
        inputs = inputs_of(mechanism)
        leaves = [q, k, v, *inputs.values()]
        seed = torch.randn(2, 4, q_len, 6, dtype=torch.float64)
        results = []
        for executor in ("tiled", "reference"):
            out = regard.attend(q, k, v, mechanism, mask=MASKS[mask], executor=executor, **inputs)
            results.append((out, *torch.autograd.grad((out * seed).sum(), leaves)))
        assert max(float((a - b).abs().max()) for a, b in zip(*results, strict=True)) < 1e-9


def test_user_mechanism_of_two_plain_functions():
    """w = softplus and mask = causal & window, as a user writes them."""

    def near(b, h, i, j):
        return (j <= i) & (i - j < 24)

    mechanism = Weighted(normalizer=F.softplus, mask=near)
    q, k, v = (torch.randn(1, 2, 70, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    outs = [regard.attend(q, k, v, mechanism, executor=e) for e in ("tiled", "reference")]
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outs]
    assert torch.allclose(*outs, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    "mechanism",
    [Weighted(), Weighted(normalizer=softmax_plus(0.5)), regard.get("softpick"), regard.get("cog-attention"), regard.get("relu")],
)
def test_merge_over_split_keys(mechanism):
    q, k, v = (torch.randn(2, 4, 40, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    parts = [regard.attend_with_stats(q, k[:, :, a:b], v[:, :, a:b], mechanism) for a, b in ((0, 7), (7, 25), (25, 40))]
    inputs = {"sink": torch.full((4,), 0.5, dtype=torch.float64)} if mechanism.declared else {}
    merged, stats = regard.merge(mechanism, parts, **inputs)
    whole, whole_stats = regard.attend_with_stats(q, k, v, mechanism)
    assert torch.allclose(merged, whole, atol=1e-12)
    assert torch.allclose(stats.total * (stats.shift - whole_stats.shift).exp(), whole_stats.total, atol=1e-9)
    a, b = (torch.autograd.grad(x.square().sum(), (q, k, v), retain_graph=True) for x in (merged, whole))
    assert all(torch.allclose(x, y, atol=1e-9) for x, y in zip(a, b, strict=True))


def test_merge_with_an_empty_part_and_of_roots():
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in range(3))
    left = regard.attend_with_stats(q, k[:, :, :4], v[:, :, :4], mask=lambda b, h, i, j: (i < 4) & (j == j))
    right = regard.attend_with_stats(q, k[:, :, 4:], v[:, :, 4:])
    merged, _ = regard.merge(Weighted(), [left, right])
    assert torch.isfinite(merged).all()
    with pytest.raises(regard.RegardError, match="cannot be merged"):
        regard.merge(regard.get("sparsemax"), [left, right])


def test_selection_by_block_rows():
    keep = torch.rand(1, 2, 5, 5) > 0.5
    keep[:, :, :, 0] = True
    mechanism = Weighted(mask=Causal(), select=Chosen(lambda q, k, first: Selection(keep, 32, 32)))
    q, k, v = (torch.randn(1, 2, 150, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    results = []
    for executor in ("tiled", "reference"):
        out = regard.attend(q, k, v, mechanism, executor=executor)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert max(float((a - b).abs().max()) for a, b in zip(*results, strict=True)) < 1e-10


def test_packed_documents_equal_separate_calls():
    q, k, v = (torch.randn(1, 2, 50, 8, dtype=torch.float64) for _ in range(3))
    ids = torch.tensor([[0] * 13 + [1] * 30 + [2] * 7])
    for name in ("softmax", "softpick", "sparsemax", "sigmoid"):
        packed = regard.attend(q, k, v, name, mask=Causal() & Segments(), segments=ids)
        cuts = ((0, 13), (13, 43), (43, 50))
        parts = torch.cat([regard.attend(*[x[:, :, a:b] for x in (q, k, v)], name, mask=Causal()) for a, b in cuts], 2)
        assert torch.allclose(packed, parts, atol=1e-11), name


@pytest.mark.parametrize("how", ["sum", "head", "gate"])
def test_hybrids(how):
    q, k, v = (torch.randn(2, 4, 20, 8, dtype=torch.float64) for _ in range(3))
    a, b = regard.get("softmax"), regard.get("lightning-attention-2")
    outs = [regard.attend(q, k, v, m, mask=Causal()) for m in (a, b)]
    hybrid = Hybrid((a, b), how, (1, 3) if how == "head" else ())
    if how == "sum":
        assert torch.allclose(regard.attend(q, k, v, hybrid, mask=Causal()), outs[0] + outs[1])
        state, rows = None, []
        for t in range(20):
            row, state = regard.step(*[x[:, :, t : t + 1] for x in (q, k, v)], hybrid, state)
            rows.append(row)
        assert torch.allclose(torch.cat(rows, 2), outs[0] + outs[1])
    elif how == "head":
        slopes = -torch.rand(4, dtype=torch.float64)
        out = regard.attend(q, k, v, hybrid, mask=Causal(), log_decay=slopes)
        last = regard.attend(q[:, 1:], k[:, 1:], v[:, 1:], b, mask=Causal(), log_decay=slopes[1:])
        assert torch.allclose(out, torch.cat((outs[0][:, :1], last), 1))
    else:
        gate = torch.rand(2, 4, 20, 2, dtype=torch.float64)
        assert torch.allclose(regard.attend(q, k, v, hybrid, mask=Causal(), gate=gate), gate[..., :1] * outs[0] + gate[..., 1:] * outs[1])


def test_sinkhorn_says_that_it_is_not_row_local():
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    found = regard.plan(q, k, v, Weighted(normalizer=Sinkhorn(5)))
    assert found.executor == "dense" and "not row-local" in dict(found.refused)["tiled"]


def test_decode_cache_grows_without_changing_results():
    q, k, v = (torch.randn(1, 2, 33, 8, dtype=torch.float64) for _ in range(3))
    whole, state = regard.attend(q, k, v, mask=Causal()), None
    for t in range(33):
        out, state = regard.step(*[x[:, :, t : t + 1] for x in (q, k, v)], "softmax", state)
        assert torch.allclose(out, whole[:, :, t : t + 1])
    assert state.bytes == 2 * 2 * 33 * 8 * 8


def test_weights_are_what_multiplies_the_values():
    q, k, v = (torch.randn(1, 2, 12, 8, dtype=torch.float64) for _ in range(3))
    for name in ("softmax", "softpick", "cog-attention", "lightning-attention-2", "based", "hedgehog"):
        w = regard.weights(q, k, name, mask=Causal())
        assert torch.allclose(w @ v, regard.attend(q, k, v, name, mask=Causal()), atol=1e-10), name


def test_tiled_memory_stays_far_below_the_matrix():
    from regard.lab.memory import peak_bytes

    q, k, v = (torch.randn(1, 2, 4096, 16) for _ in range(3))
    used = peak_bytes(lambda: regard.attend(q, k, v, "softpick", mask=Causal()))
    assert used < 0.1 * 2 * 4096 * 4096 * 4


def test_learned_input_of_a_user():
    mechanism = Weighted(position=Modified(lambda s, heat: s * heat, (Input("heat", "hq"),)))
    q, k, v = (torch.randn(1, 2, 12, 8, dtype=torch.float64) for _ in range(3))
    heat = torch.rand(2, 12, dtype=torch.float64, requires_grad=True)
    grads = [
        torch.autograd.grad(regard.attend(q, k, v, mechanism, heat=heat, executor=e).square().sum(), heat)[0]
        for e in ("tiled", "reference")
    ]
    assert torch.allclose(*grads)


def test_compiles_without_a_graph_break():
    q, k, v = (torch.randn(1, 2, 32, 8) for _ in range(3))
    mask = Causal()
    compiled = torch.compile(lambda q, k, v: regard.attend(q, k, v, "softmax", mask=mask) * 2, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(q, k, v), 2 * regard.attend(q, k, v, "softmax", mask=mask))


@pytest.mark.parametrize("name", ["softmax", "softpick", "relu"])
def test_heads_with_blocks_of_their_own(name):
    """Uneven numbers of blocks a head, a ragged last block, statistics and gradients included."""
    from dataclasses import replace

    keep = torch.rand(2, 4, 5, 5) > 0.6
    keep[:, :, :, 1] = True
    keep[0, 2, 3] = False
    mechanism = replace(regard.get(name), select=Chosen(lambda q, k, first: Selection(keep, 32, 32)))
    q, k, v = (torch.randn(2, h, 150, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    for mask in (None, Causal()):
        results = []
        for executor in ("tiled", "reference"):
            out, stats = regard.attend_with_stats(q, k, v, mechanism, mask=mask, executor=executor)
            results.append((out, stats.visible, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        assert max(float((a - b).abs().max()) for a, b in zip(*results, strict=True)) < 1e-9


def test_flex_forward_equals_reference():
    from regard.engine import flex
    from regard.engine.problem import pose

    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    for mechanism, mask in ((Weighted(), Causal()), (Weighted(position=Alibi()), Causal()), (Weighted(), Window(9))):
        out = flex.run(pose(mechanism, mask, q, k, v, None, {}))
        assert torch.allclose(out, regard.attend(q, k, v, mechanism, mask=mask, executor="reference"), atol=1e-5)
    assert "no backward" in dict(regard.plan(q, k, v, "sigmoid").refused)["flex"]
    assert flex.refusal(regard.get("sigmoid"), "cuda") == "" and "unshifted" in flex.refusal(regard.get("softpick"), "cuda")
