"""Pretrained decoders whose attention layers become layers of any causal mechanism, gates too."""

from __future__ import annotations

import copy

import pytest
import torch

import regard
from regard import models
from regard.adapt import Lora, carry_out, convert
from regard.errors import RegardError

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny").double()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(32, 120, (2, 17), generator=torch.Generator().manual_seed(0))


def converted(tiny, mechanism, **options):
    model = copy.deepcopy(tiny)
    torch.manual_seed(0)
    return convert(model, mechanism, **options), model


# The model's own angles are rounded to float32, those of a mechanism with positions of its own are not.
WIDE = {"nha": ({"window": 64, "rope": 10000.0}, 1e-5), "softmax": ({}, 1e-10)}


@pytest.mark.parametrize("name", WIDE)
def test_what_is_softmax_gives_what_the_model_gave(name, tiny, ids):
    options, rounding = WIDE[name]
    _, model = converted(tiny, regard.get(name, **options))
    assert not any(hasattr(part, "q_proj") for part in model.modules())
    torch.testing.assert_close(model(ids).logits, tiny(ids).logits, rtol=0, atol=rounding)


CLOSE = {"rtol": 0, "atol": 1e-5}  # of logits of size 10, by norms that the model computes in float32


@pytest.mark.parametrize(
    "mechanism",
    ["gsa", "regla", "deltanet", "softmax", regard.get("nha", window=5, slots=8)],
    ids=lambda x: x if isinstance(x, str) else "nha",
)
@torch.no_grad()
def test_a_cache_and_padding_change_nothing(mechanism, tiny, ids):
    _, model = converted(tiny, mechanism)
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :9])
    parts = [first.logits, *(model(ids[:, t : t + 1], cache=first.past_key_values).logits for t in range(9, 17))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
    here = torch.ones(2, 21, dtype=torch.long)
    here[:, :4] = 0
    padded, places = torch.cat((ids[:, :4], ids), 1), (here.cumsum(-1) - 1).clamp_min(0)
    for cached in (True, False):
        found = model(padded, attention_mask=here, position_ids=places, use_cache=cached).logits
        torch.testing.assert_close(found[:, 4:], whole, **CLOSE)
    rows = [[(0, 5), (5, 17)], [(0, 11), (11, 17)]]
    told = torch.stack([torch.cat([torch.arange(b - a) for a, b in row]) for row in rows])
    packed = model(ids, position_ids=told, use_cache=False).logits
    for row, spans in enumerate(rows):
        for a, b in spans:
            torch.testing.assert_close(packed[row, a:b], model(ids[row : row + 1, a:b], use_cache=False).logits[0], **CLOSE)
    tokens = model.generate(padded, attention_mask=here, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens[:, 4:], model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_it_learns_what_the_model_knew(tiny, ids):
    conversion, model = converted(tiny, "gsa", layers=[1])
    assert sum(hasattr(part, "attention") for part in model.modules()) == 1

    def gap():
        return float((model(ids).logits - tiny(ids).logits).square().mean())

    before = gap()
    stages = regard.adapt.Transfer(steps=30, lr=3e-3), Lora(steps=4, targets=("attention.q", "attention.v"))
    report = carry_out(conversion, list(stages), lambda generator: torch.randint(32, 120, (2, 24), generator=generator))
    assert gap() < 0.85 * before and all(x == x for losses in report.losses for x in losses)


def test_what_has_no_place_is_refused(tiny):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    normed = Qwen3ForCausalLM(Qwen3Config(vocab_size=32, head_dim=16, **small))
    for model, mechanism, message in (
        (normed, "gsa", "has q_norm, k_norm"),
        (tiny, "gla", "key_dim=None"),
        (tiny, "rala", "causal=False"),
        (tiny, "nothing", "is not known"),
    ):
        with pytest.raises(RegardError, match=message):
            convert(model, mechanism)
    assert all(hasattr(layer.self_attn, "q_proj") for layer in tiny.model.layers)


def test_gla_s_converter_keeps_the_width_of_keys(tiny, ids):
    _, model = converted(tiny, regard.get("gla", key_dim=None))
    assert model(ids).logits.isfinite().all()


def test_the_model_s_scale_of_scores_is_kept(ids):
    from transformers import GraniteConfig, GraniteForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(vocab_size=128, attention_multiplier=0.7, **small)).double().eval()
    wanted = model(ids).logits
    convert(model, "softmax")
    torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=1e-10)
