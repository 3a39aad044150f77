"""Mechanisms named in a config: attn_implementation="regard:softpick", with and without options, loaded, set, patched and generated with."""

from __future__ import annotations

import copy

import pytest
import torch

import regard.adapt
from regard import RegardError
from regard.models import encode, load, path

NAMES = {
    "regard": "softmax",
    "regard:softpick": "softpick",
    "regard:moba?block_size=8&top_k=2": regard.get("moba", block_size=8, top_k=2),
}


@pytest.fixture(scope="module")
def ids():
    return torch.cat([encode("the cat sat on the mat, and the dog"), encode("one two three four five six seven 8")])[:, :32]


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_patch_and_leaves_the_others_alone(name, ids):
    model, other = load("tiny"), load("tiny")
    with torch.no_grad():
        own = other(ids).logits
        model.set_attn_implementation(name)
        found = model(ids).logits
        with regard.adapt.patch(other, NAMES[name]):
            torch.testing.assert_close(found, other(ids).logits)
        assert torch.equal(other(ids).logits, own)
        assert name == "regard" or not torch.allclose(found, own, atol=1e-2)
        with regard.adapt.patch(model, "softmax"):  # a patch stands above the name
            torch.testing.assert_close(model(ids).logits, own)
        assert torch.equal(model(ids).logits, found)
        assert torch.equal(copy.deepcopy(model)(ids).logits, found)
    loaded = type(model).from_pretrained(path("tiny"), attn_implementation=name, dtype=torch.float32).eval()
    assert torch.equal(loaded(ids).logits, found)


def test_padding_and_generation(ids):
    model = load("tiny")
    model.set_attn_implementation("regard:softpick")
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    found = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for row, start in ((0, 0), (1, 9)):
        alone = model.generate(
            ids[row : row + 1, start:], attention_mask=mask[row : row + 1, start:], max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        assert torch.equal(found[row, start:], alone[0])


def test_saved_configs_load(ids, tmp_path):
    model = load("tiny", attn_implementation="regard:softpick")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="regard:softpick", dtype=torch.float32).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


REFUSED = {
    "regard:sofpick": "Did you mean softpick",
    "regard:moba?block=3": "Did you mean block_size",
    "regard:longheads": "is a policy",
    "regard:moba?block_size": "is not key=value",
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_names_are_refused_when_they_are_set(name):
    model = load("tiny")
    before = model.config._attn_implementation
    with pytest.raises(RegardError, match=REFUSED[name]):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == before


def test_what_must_be_learned_is_refused_with_advice_that_works(ids):
    model = load("tiny")
    name = next(n for n in regard.names() if learns(n))
    with pytest.raises(RegardError, match=r"regard\.adapt\.patch\(model, "):
        model.set_attn_implementation(f"regard:{name}")
        model(ids)
    model.set_attn_implementation("sdpa")
    with regard.adapt.patch(model, name):
        assert model(ids).logits.isfinite().all()


def learns(name):
    """Whether a mechanism that a causal model can run has a learned tensor and none projected from x."""
    from regard.algebra import Learned

    made = regard.get(name)
    declared = getattr(made, "declared", ())
    kinds = {type(item.layer) for item in declared if item.layer is not None}
    return (
        kinds == {Learned}
        and getattr(made, "can_be_causal", False)
        and all(item.layer.trainable for item in declared if item.layer is not None)
    )
