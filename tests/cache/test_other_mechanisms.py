"""Policies read softmax: a model that attends by something else says so, whichever came first."""

from __future__ import annotations

import pytest

from regard import RegardError, adapt, models
from regard.cache import StreamingLLM


def test_a_policy_and_another_mechanism_are_refused_together():
    model = models.load("tiny")
    ids = models.encode("import os and sys")

    def said():
        return model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).tolist()

    own = said()
    model.set_attn_implementation("regard:softpick")
    with pytest.raises(RegardError, match="set_attn_implementation"), StreamingLLM(40)(model):
        pass
    model.set_attn_implementation("sdpa")
    with adapt.patch(model, "softpick"), pytest.raises(RegardError, match="restore the patch"), StreamingLLM(40)(model):
        pass
    with StreamingLLM(40)(model), pytest.raises(RegardError, match="without the policy"):
        adapt.patch(model, "softpick")
    assert said() == own
    with StreamingLLM(40)(model):
        assert said() == own
