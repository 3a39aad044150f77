"""What the checks of secondary-attention-sinks do not hold: bad input, rows of a batch, caches, a pretrained model."""

import pytest
import torch

import regard
from regard import taps
from regard.interpret import detect_sinks, mlp_alignment, sink_score, suppress
from regard.zoo.analysis.secondary_attention_sinks import Sink, sink_levels

pytest.importorskip("transformers")


def test_rows_stand_alone_and_windows_at_the_edge():
    states = torch.randn(5, 2, 7, 8)
    both = detect_sinks(states, clip=False, threshold=0.5, least=0, margin=1)
    assert both == [detect_sinks(states[:, b : b + 1], clip=False, threshold=0.5, least=0, margin=1)[0] for b in range(2)]
    rising = torch.ones(4, 1, 3, 8) * torch.tensor([1.0, 2.0, 3.0, 50.0])[:, None, None, None]
    assert detect_sinks(rising)[0][0].layers == (3,)
    for bad, options, message in (
        (states[:, 0], {}, "expected"),
        (states, {"bos": (7,)}, "bos"),
        (states, {"bos": ()}, "bos"),
        (states[:1], {}, "one layer"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            detect_sinks(bad, **options)


@torch.no_grad()
def test_a_pretrained_model_s_first_byte():
    model = regard.models.load("tiny")
    ids = regard.models.encode("def suppress(model, layer): return model.layers[layer]")
    with regard.taps(model, ["weights", "mlp"]) as seen:
        model(ids)
    assert sink_score(seen.stack("weights")).shape == (1, 4, ids.shape[1])
    found = mlp_alignment(model, ids)
    assert found.cosine.shape == found.norm.shape == (1, 4, ids.shape[1])
    direction = seen["mlp", 2][0, 9]
    with suppress(model, 2, direction, 0.5), regard.taps(model, "mlp", layers=[2]) as held:
        model(ids)
    assert float(held["mlp", 2][0, 9].norm()) == pytest.approx(0.5, rel=1e-3)
    with suppress(model, 2, direction, 0.5, skip=10), regard.taps(model, "mlp", layers=[2]) as held:
        model(ids)
    assert torch.equal(held["mlp", 2][0, 9], direction)
    with pytest.raises(regard.RegardError, match="direction"), suppress(model, 2, direction[:5]):
        model(ids)
    with pytest.raises(regard.RegardError, match="threshold"):
        suppress(model, 2, direction, 0.0)


def test_lives_of_l_less_fifteen_layers_are_primary_and_without_clipping_all_layers_are_looked_at():
    side = torch.eye(8)[1]
    states = torch.randn(24, 1, 4, 8) * 0.01 + side
    states[:, 0, 0] = torch.eye(8)[0] * torch.arange(1.0, 25)[:, None]  # the first token, in one direction from the start
    for token, life in ((1, 9), (2, 8), (3, 4)):
        states[:life, 0, token] = torch.eye(8)[0]
    first, *others = detect_sinks(states, clip=False)[0]
    assert first.layers == tuple(range(24)) and first.kind == "primary"
    assert [(one.position, one.life, one.kind) for one in others] == [(1, 9, "primary"), (2, 8, "secondary"), (3, 4, "noise")]


def test_scores_within_a_window_by_hand():
    maps = [torch.rand(2, 3, 6, 6) for _ in range(2)]
    for window in (None, 1, 3):
        found = sink_score(maps, window)
        for b in range(2):
            for layer in range(2):
                for t in range(6):
                    rows = [i for i in range(t + 1, 6) if window is None or i <= t + window]
                    truth = maps[layer][b, :, rows, t].mean() if rows else 0.0
                    assert float(found[b, layer, t]) == pytest.approx(float(truth), abs=1e-6)


def test_states_made_by_hand_get_their_kinds():
    """Eight layers; the first token's norm rises behind layer 1 and falls behind layer 6."""
    states = torch.zeros(8, 1, 5, 4)
    states[..., 1] = 1.0
    states[:, 0, 0] = torch.tensor([1.0, 0, 0, 0])
    states[1:6, 0, 0] *= 50
    states[2:5, 0, 2] = torch.tensor([0.95, 0.3, 0, 0])  # a life of three
    states[3:4, 0, 3] = torch.tensor([-1.0, 0.1, 0, 0])  # of one, against it
    for options, kinds in (
        ({"margin": 3, "least": 1}, ["primary", "secondary", "noise"]),
        ({"margin": 3, "least": 2}, ["primary", "secondary", "noise"]),
        ({"margin": 3, "least": 3}, ["primary", "noise", "noise"]),
        ({"margin": 5, "least": 1}, ["primary", "primary", "noise"]),
    ):
        (found,) = detect_sinks(states, **options)
        assert [sink.kind for sink in found] == kinds
        assert [(sink.position, sink.layers) for sink in found] == [(0, (1, 2, 3, 4, 5)), (2, (2, 3, 4)), (3, (3,))]
        assert [(sink.creation, sink.life) for sink in found] == [(1, 5), (2, 3), (3, 1)]
    assert len(detect_sinks(states, threshold=0.97, margin=3)[0]) == 2 and len(detect_sinks(states, threshold=0.999, margin=3)[0]) == 1
    assert detect_sinks(states, clip=False, margin=1)[0][0].layers == tuple(range(8))
    behind = torch.cat((states[:, :, 1:2], states), 2)
    assert [sink.position for sink in detect_sinks(behind, (0, 1), margin=3)[0]] == [1, 3, 4]


def test_outputs_along_a_direction_are_shortened():
    pytest.importorskip("transformers")
    from regard.lab.checks.shared.decoding import llama

    model, ids = llama(), torch.randint(1, 50, (1, 7))
    with taps.read(model, "mlp", layers=[0]) as seen:
        model(ids)
    y = seen["mlp", 0]
    direction = y[0, 5] + 0.05 * y[0, 5].norm() * torch.nn.functional.normalize(torch.randn(32, dtype=y.dtype), dim=0)
    near = torch.nn.functional.cosine_similarity(y[0], direction, dim=-1)
    for options, skip, cosine, length in (
        ({"threshold": 7.0}, 3, 0.98, 7.0),
        ({}, 3, 0.98, 100.0),
        ({"cosine": 0.0, "skip": 1}, 1, 0.0, 100.0),
    ):
        with suppress(model, 0, direction, **options), taps.read(model, "mlp", layers=[0]) as seen:
            model(ids)
        for t in range(7):
            hit = t >= skip and float(near[t]) > cosine
            truth = y[0, t] * (length / y[0, t].norm() if hit else 1.0)
            assert torch.allclose(seen["mlp", 0][0, t], truth) and (hit or t != 5)


@pytest.mark.parametrize("reach", [0, 1, 2, 5])
def test_levels_are_what_steps_of_reach_join(reach):
    places = [(9, 5), (3, 5), (3, 5), (4, 6), (5, 6), (9, 8), (2, 9)]
    sinks = [Sink(at, tuple(range(c, c + n)), "secondary") for at, (c, n) in enumerate(places)]
    others = [Sink(20, (3, 4, 5, 6, 7), "noise"), Sink(30, tuple(range(9)), "primary")]
    name = list(range(len(places)))  # of each one's level: the least number that steps lead to
    for _ in places:
        for i, (a, b) in enumerate(places):
            name[i] = min(name[j] for j, (c, d) in enumerate(places) if abs(a - c) <= reach and abs(b - d) <= reach)
    levels = [{i for i, own in enumerate(name) if own == level} for level in set(name)]
    levels.sort(key=lambda level: min(places[i] for i in level))
    for order in (sinks + others, others + sinks[::-1]):
        assert [{one.position for one in level} for level in sink_levels(order, reach=reach)] == levels
        assert [[one.position for one in level] for level in sink_levels(order, "noise", reach)] == [[20]]
    assert sink_levels(sinks) == sink_levels(sinks, "secondary", 0) and sink_levels([]) == []
