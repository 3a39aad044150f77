"""Abrupt learning in context beyond its checks: training by the paper's settings, plots, and what is refused."""

from __future__ import annotations

import pytest
import torch

from regard import RegardError
from regard.tasks.item_labels import ItemLabels, item_labels
from regard.zoo.analysis.abrupt_icl import InductionNet, abruptness, emergence, nested_logits


def test_paper_s_settings_run():
    data = item_labels(64, generator=torch.Generator().manual_seed(0))
    assert data.width == 128 and data.noise == 0.1 and data.slots == 32
    found = emergence(data, steps=5, every=2, count=20)
    assert found.steps == [0, 2, 4, 5] and found["test"][0] <= 1 and found.plot().startswith("<svg")
    assert found.model.readout.out_features == 32 and len(found.model.mlp) == 3
    assert set(found.measures) == {"test", "novel", "flip", "weights", "previous", "copied", "target", "in_context"}


def test_one_seed_is_one_run_and_another_another():
    data = item_labels(8, 8, 6, torch.Generator().manual_seed(0), slots=2, novel=8)
    runs = [emergence(data, pairs=2, copies=1, steps=3, every=3, count=5, batch=4, seed=seed).model.readout.weight for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_what_does_not_fit_is_refused():
    data = item_labels(8, 8, 6, torch.Generator().manual_seed(0), slots=4, novel=8)
    draw = torch.Generator()
    for options in ({"pairs": 5}, {"pairs": 4, "copies": 3}, {"pairs": 0}, {"pairs": 4, "bursty": 1.5}, {"pairs": 4, "novel": -1}):
        with pytest.raises(RegardError, match="expected pairs"):
            data.draw(2, draw, **options)
    with pytest.raises(RegardError, match="multiple of the 8 labels"):
        item_labels(12, 8, 6)
    with pytest.raises(RegardError, match="novel=4"):
        item_labels(8, 8, 6, novel=4)
    with pytest.raises(RegardError, match="one width"):
        ItemLabels(torch.ones(8, 3), torch.ones(8, 4), novel=8)
    with pytest.raises(RegardError, match="as many labels"):
        item_labels(8, 2, 6, slots=8, novel=8).draw(2, draw, pairs=4, copies=1, distinct=True)
    with pytest.raises(RegardError, match="layers=0"):
        InductionNet(4, 2, layers=0)
    with pytest.raises(RegardError, match="more steps"):
        abruptness(nested_logits(steps=5))
    with pytest.raises(RegardError, match="depth=2"):
        nested_logits(depth=2)
    with pytest.raises(RegardError, match="every=0"):
        emergence(data, every=0)
