"""What the checks of secondary-attention-sinks do not hold: bad input, rows of a batch, caches, a pretrained model."""

import pytest
import torch

import regard
from regard.interpret import detect_sinks, mlp_alignment, sink_score, suppress

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
