"""Learned eviction: decoding in pieces over grouped keys, without sinks, places and bytes of its state, and the router's dropout."""

from __future__ import annotations

import math

import pytest
import torch

from regard import RegardError, attend
from regard.lab.checks.shared.layers import drawn
from regard.nn import Attention
from regard.zoo.linear.lalte import MARGIN, BudgetController, LTEAttention, Router, eviction_mask, lalte_layers


def layer_of(**options: object) -> LTEAttention:
    torch.manual_seed(1)
    layer = drawn(LTEAttention(32, 4, **{"kv_heads": 2, "window": 7, "sinks": 3, "budget": 64, **options}))  # type: ignore[arg-type]
    layer.router.last.bias.data.zero_()  # type: ignore[union-attr]
    return layer.eval()  # with decisions of both kinds


@pytest.mark.parametrize("sinks", [0, 3])
def test_decoding_in_pieces_equals_the_whole(sinks: int) -> None:
    layer, x = layer_of(sinks=sinks), torch.randn(2, 32, 32, dtype=torch.float64)
    whole, state, outs = layer(x), None, []
    for start, stop in ((0, 1), (1, 9), (9, 12), (12, 27), (27, 32)):
        out, state = layer.step(x[:, start:stop], state)
        outs.append(out)
    assert state is not None and 0.1 < float(layer.kept.double().mean()) < 0.9
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    assert state.length == 32 and state.sink_k.shape == state.sink_v.shape == (2, 2, sinks, 8)
    assert state.k.shape == state.v.shape == (2, 2, 7 + 2 * MARGIN + 1, 8)
    assert state.past_k.shape == state.past_v.shape == (2, 2, 64 - sinks, 8) and state.score.shape == (2, 2, 64 - sinks)
    # What left the window and is no sink stands in the places where it is kept, with its score.
    gone, keys = torch.arange(sinks, 32 - 8), layer.split(x)[1]
    for row in range(2):
        for head in range(2):
            held = state.score[row, head] > -math.inf
            want = gone[layer.kept[row, head, gone]]
            at = state.place[row, head][held]
            assert sorted(at.tolist()) == want.tolist()
            torch.testing.assert_close(state.score[row, head][held], layer.scores[row, head, at])
            torch.testing.assert_close(state.past_k[row, head][held], keys[row, head, at])
    wide = 2 * (20 + sinks + 64 - sinks) * 8 * 8 + (64 - sinks) * (8 + 8)  # doubles, places as integers of 8 bytes
    assert state.bytes == 2 * 2 * wide


def test_a_full_past_gives_up_its_lowest_score_alone() -> None:
    layer, x = layer_of(budget=5, sinks=1), torch.randn(1, 60, 32, dtype=torch.float64)
    layer(x)
    state, held = None, [set[int]() for _ in range(2)]
    for t in range(60):
        _, state = layer.step(x[:, t : t + 1], state)
        gone = t - 8
        for head in range(2):
            score = layer.scores[0, head]
            if gone >= 1 and score[gone] > 0:
                lowest = min(held[head], key=lambda at: float(score[at]), default=gone)
                if len(held[head]) < 4:
                    held[head].add(gone)
                elif score[gone] > score[lowest]:
                    held[head] = held[head] - {lowest} | {gone}
            seen = state.score[0, head] > -math.inf
            assert set(state.place[0, head][seen].tolist()) == held[head]
    assert all(len(places) == 4 for places in held)


def test_what_a_query_sees() -> None:
    kept = torch.tensor([False, False, True, False, False, True, False, False])[None, None]
    at = torch.arange(8)
    q, v = torch.zeros(1, 1, 8, 4), torch.eye(8)[None, None]
    for window, sinks in ((2, 1), (2, 0), (0, 1)):
        w = attend(q, q, v, mask=eviction_mask(window, sinks), kept=kept)[0, 0]
        want = (at[:, None] >= at) & ((at[:, None] - at <= window) | (at < sinks) | kept[0])
        assert torch.equal(w > 0, want)


def test_the_router_s_shapes_first_value_and_dropout() -> None:
    torch.manual_seed(0)
    router = Router(3, 8)
    found = {name: tuple(p.shape) for name, p in router.named_parameters()}
    assert {name: shape for name, shape in found.items() if name.endswith("weight")} == {
        "layers.0.weight": (24, 16, 3), "layers.3.weight": (12, 8, 3), "layers.6.weight": (6, 4, 3), "last.weight": (3, 2, 1),
    }  # fmt: skip
    assert router.last.bias.tolist() == [0.5] * 3  # type: ignore[union-attr]
    assert {tuple(p.shape) for name, p in Router(1, 2).named_parameters() if name.startswith("layers.6")} == {(1, 1, 3), (1,)}
    assert [layer.p for layer in router.modules() if isinstance(layer, torch.nn.Dropout)] == [0.1] * 3
    layer = LTEAttention(16, 2, dropout=0.25)
    assert {part.p for part in layer.router.modules() if isinstance(part, torch.nn.Dropout)} == {0.25}
    k = torch.randn(1, 3, 9, 8)
    assert not torch.equal(router(k, k), router(k, k)) and torch.equal(router.eval()(k, k), router(k, k))
    assert {name: tuple(p.shape) for name, p in LTEAttention(16, 4, 2).named_parameters() if "router" not in name} == {
        "q.weight": (16, 16), "k.weight": (8, 16), "v.weight": (8, 16), "out.weight": (16, 16),
    }  # fmt: skip


@pytest.mark.parametrize("options", [{"window": 5}, {"sinks": -1}, {"budget": 4, "sinks": 4}, {"heads": 3}, {"kv_heads": 3}], ids=str)
def test_sizes_that_cannot_be(options: dict[str, int]) -> None:
    with pytest.raises(RegardError, match="expected"):
        LTEAttention(16, **{"heads": 4, **options})  # type: ignore[arg-type]
    LTEAttention(16, 4, window=6, sinks=0, budget=1)


def test_the_controller_starts_small_and_moves_every_32_steps() -> None:
    control, kept = BudgetController(3, 4), torch.zeros(2, 3, 9, dtype=torch.bool)
    kept[:, 1], kept[0, 2, :8] = True, True  # on average 0, 9 and 4 tokens
    for step in range(1, 65):
        found = control.update(kept).tolist()
        grown = [(1.0, 1.0, 1.0), (0.5, 1.5, 1.0), (0.25, 2.25, 1.0)][step // 32]
        assert found == pytest.approx([1e-6 * x for x in grown])
    none = torch.zeros(2, 3, 9, dtype=torch.bool)
    control.update(none)
    assert control.count.tolist() == pytest.approx([0.0, 8.1, 3.6])
    assert BudgetController(3, 4, interval=1).update(kept.to("meta")).is_meta  # weights stand where decisions do


def test_layers_take_turns() -> None:
    made = lalte_layers(5, 16, 2, window=8, sinks=1, budget=9)
    assert [type(one) for one in made] == [Attention, LTEAttention, Attention, LTEAttention, Attention]
    assert [(one.window, one.sinks, one.budget) for one in made if isinstance(one, LTEAttention)] == [(8, 1, 9)] * 2
