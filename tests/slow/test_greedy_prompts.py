"""Greedy output of every strategy is that of `model.generate(do_sample=False)`, token for token, on 20 real prompts of 200 tokens."""

from __future__ import annotations

import pytest

from regard import models
from regard.lab.greedy import agreements, real_prompts, strategies
from regard.lab.sweep import Bytes
from regard.tasks.text import python_text

pytest.importorskip("transformers")


@pytest.mark.slow
def test_every_strategy_says_what_plain_decoding_says():
    model = models.load("tiny").double()  # float32 rounds ties of a masked pass and a plain step apart
    found = dict(agreements(model, real_prompts(Bytes(), python_text(), 20, 96), 200))
    assert set(found) == set(strategies(model))
    assert all(one.prompts == 20 and not one.gaps for one in found.values()), {name: one.gaps for name, one in found.items()}
    assert found["plain"].per_pass == 1.0 and found["prompt-lookup"].per_pass > 1.2 and found["draft model"].per_pass > 1.5
