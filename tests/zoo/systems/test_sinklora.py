"""SinkLoRA: right padding, bad input, the model as it was, and H2O behind it."""

import pytest
import torch

from regard import RegardError
from regard.cache import H2O
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.sinklora import longer, sf_attention, sf_training


def test_padding_on_the_right_is_not_seen_and_padding_on_the_left_is_refused():
    model, ids = llama(), torch.randint(1, 50, (2, 32))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    other = ids.clone()
    other[1, 20:] = 7
    for restore in (1.0, 0.0):  # the rolled groups would read it
        with sf_training(model, restore=restore):
            one, two = (model(x, attention_mask=mask, use_cache=False).logits for x in (ids, other))
        assert torch.equal(one[1, :20], two[1, :20]) and one.isfinite().all()
    with sf_training(model), pytest.raises(RegardError, match="padding on the right"):
        model(ids, attention_mask=mask.flip(1), use_cache=False)


def test_the_model_comes_back_and_generates_with_full_attention():
    model, ids = llama(length=16), torch.randint(1, 50, (1, 24))
    tuned = longer(model, 64)
    before = model.generate(ids, max_new_tokens=6, do_sample=False)
    with pytest.raises(ValueError, match="stop"), sf_training(tuned):
        raise ValueError("stop")
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), before)
    with H2O(1.0)(model):
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), before)
    with sf_training(model), pytest.raises(RegardError, match="the whole text"):
        model.generate(ids, max_new_tokens=3, do_sample=False)


def test_bad_input():
    q = torch.randn(1, 4, 18, 8)
    for options, told in (
        ({"group": 5}, "even one"),
        ({"group": 0}, "group of at least 1"),
        ({"n_sink": -1}, "0 or more sinks"),
        ({"shift_heads": 1.5}, "shares"),
        ({"group": 4, "restore": 0.5}, "group=4 divides, not 18"),
    ):
        with pytest.raises(RegardError, match=told):
            sf_attention(q, q, q, **options)
    with pytest.raises(RegardError, match="above 0"), sf_training(llama(), group=0.0):
        pass
    assert sf_attention(q[:0], q[:0], q[:0], 6).shape == (0, 4, 18, 8)
    assert sf_attention(q[:, :, :3], q[:, :, :3], q[:, :, :3], 2).isfinite().all()  # shorter than the sinks
    with pytest.raises(RegardError, match="plain rotary"):
        longer(longer(llama(length=16), 32).get_base_model(), 64)
