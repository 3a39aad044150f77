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


def test_what_learns_and_how_far_positions_are_divided():
    for length, factor in ((64, 4.0), (60, 4.0), (17, 2.0), (16, None)):
        model = llama(length=16)
        tuned = longer(model, length, rank=3, alpha=12, targets=("q_proj",), also=("norm",))
        config = model.config
        assert config.max_position_embeddings == length and config.rope_parameters["rope_type"] == ("linear" if factor else "default")
        assert config.rope_parameters.get("factor") == factor and config.rope_parameters["rope_theta"] == 10000.0
        plain = llama(length=16).model.rotary_emb.inv_freq
        assert torch.allclose(model.model.rotary_emb.inv_freq.float() * (factor or 1), plain.float())
        learned = {name.split(".")[-2] if "lora" not in name else "lora" for name, p in tuned.named_parameters() if p.requires_grad}
        assert learned == {"lora", "input_layernorm", "post_attention_layernorm", "norm"}
        adapters = {name: p.shape for name, p in tuned.named_parameters() if "lora_A" in name}
        assert all("q_proj" in name and shape[0] == 3 for name, shape in adapters.items()) and len(adapters) == 2
        assert {m.scaling["default"] for m in tuned.modules() if isinstance(getattr(m, "scaling", None), dict)} == {4.0}
    plain = longer(llama(length=16), 32)
    learned = {name for name, p in plain.named_parameters() if p.requires_grad}
    assert any("embed" in name for name in learned) and {name.split(".")[-4] for name in learned if "lora_A" in name} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert {p.shape[0] for name, p in plain.named_parameters() if "lora_A" in name} == {8}
    assert not any(m.p for m in plain.modules() if isinstance(m, torch.nn.Dropout))


def test_scale_and_what_else_is_hidden():
    q, k, v = (torch.randn(2, 2, 16, 4, dtype=torch.float64) for _ in range(3))
    there = torch.arange(16) < torch.tensor([[16], [11]])
    found = sf_attention(q, k, v, 4, 1, visible=there[:, None, None], scale=0.3)
    for b, n in ((0, 16), (1, 11)):
        for h in range(2):
            for i in range(n):
                part = i // 4 if h == 0 else (i + 2) // 4
                seen = [j for j in range(min(i + 1, n)) if j < 1 or (j // 4 if h == 0 else (j + 2) // 4) == part]
                p = (0.3 * k[b, h, seen] @ q[b, h, i]).softmax(0)
                assert torch.allclose(found[b, h, i], p @ v[b, h, seen])
    assert torch.equal(sf_attention(q, k, v), sf_attention(q, k, v, 4, 4, 0.5, 1.0))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_one_head_and_an_odd_number_of_them(heads, share):
    """Shifted heads are rounded up: the first int(heads (1 - share)) stay."""
    q, k, v = (torch.randn(1, heads, 12, 4, dtype=torch.float64) for _ in range(3))
    found, at = sf_attention(q, k, v, 4, 1, share), torch.arange(12)
    for h in range(heads):
        place = at // 4 if h < int(heads * (1 - share)) else (at + 2) // 4
        seen = ((place[:, None] == place) | (at < 1)) & (at[:, None] >= at)
        p = (q[0, h] @ k[0, h].T / 2).masked_fill(~seen, -torch.inf).softmax(-1)
        torch.testing.assert_close(found[0, h], p @ v[0, h])
