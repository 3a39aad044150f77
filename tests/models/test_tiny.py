"""The pretrained model that comes with regard: what it was trained to show, and mechanisms swapped into it."""

import json

import pytest
import torch

import regard
from regard import adapt, models
from regard.lab.sweep.measure import Config, bits_per_byte, prompts, retrieval
from regard.lab.sweep.reader import Bytes
from regard.tasks.text import python_text

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny")


def test_loads_through_transformers_and_is_small(tiny):
    from transformers import AutoModelForCausalLM

    folder = models.path("tiny")
    assert (folder / "model.safetensors").stat().st_size < 8e6 and "tiny" in models.names()
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = models.encode("def main():")
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, tiny(ids).logits, atol=1e-4, rtol=1e-4)
    log = json.loads((folder / "training.json").read_text())
    assert log["parameters"] == sum(p.numel() for p in tiny.parameters()) and len(log["log"]) > 5


@torch.no_grad()
def test_predicts_text_repeats_strings_and_retrieves_facts(tiny):
    made = prompts(Bytes(), python_text(), Config(length=1024, windows=2, needles=3, depths=(0.1, 0.9)))
    assert bits_per_byte(tiny, made.windows) < 1.6
    assert sum(retrieval(tiny, one) for one in made.needles.values()) >= 1.5
    string = torch.randint(97, 123, (4, 64))
    ids = torch.cat((torch.zeros(4, 1, dtype=torch.long), string, made.windows[0][0][:, 1:100].expand(4, -1), string), 1)
    guess = tiny(ids).logits[:, -64:-1].argmax(-1)
    assert (guess == string[:, 1:]).float().mean() > 0.5


@torch.no_grad()
def test_generates_with_a_policy_in_prefill(tiny):
    prompt = models.encode("\nThe key of apple is 12345.\n" + "import os\n" * 40 + "\nThe key of apple is ")
    policy = regard.get("flexprefill", block_size=32, min_budget=64, gamma=0.95)
    with adapt.patch(tiny, policy, when="prefill"):
        out = tiny.generate(prompt, max_new_tokens=5, do_sample=False)
    assert models.decode(out[0, prompt.shape[1] :]) == "12345"


@torch.no_grad()
def test_plain_softmax_changes_no_logit(tiny):
    ids = models.encode("class Reader:\n    def tokens(self, text):\n")
    before = tiny(ids).logits
    with adapt.patch(tiny, "softmax"):
        torch.testing.assert_close(tiny(ids).logits, before, atol=1e-4, rtol=1e-4)
    assert torch.equal(tiny(ids).logits, before)


def test_unknown_models_are_named():
    with pytest.raises(regard.RegardError, match="expected one of digits-resnet, digits-vit, smollm2-135m, tiny"):
        models.load("tinny")


def test_bytes_round_trip():
    assert models.decode(models.encode("naïve")) == "naïve"
