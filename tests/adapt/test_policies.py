"""Policies that know a model's layers, inside frozen Hugging Face models."""

import pytest
import torch

from regard import RegardError, models
from regard.algebra import Rope
from regard.zoo.sparse.hylra import ReuseLayers, ReusePlan
from regard.zoo.sparse.longheads import LongHeads
from regard.zoo.sparse.ltri_llm import Ltri

transformers = pytest.importorskip("transformers")
from regard import adapt  # noqa: E402

LLAMA = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
DENSE = {
    "longheads": lambda: LongHeads(chunk=16, attend_len=64),
    "ltri-llm": lambda: Ltri(chunk=16, window=64),
    "hylra, full layers": lambda: ReuseLayers(ReusePlan((None,) * 3, 0.0), 4, block=16),
    "hylra, all keys": lambda: ReuseLayers(ReusePlan((None, 0, 0), 0.0), 64, block=16),
}


def llama(**more):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, vocab_size=97, **more)).eval()


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", DENSE)
def test_a_policy_that_reads_everything_changes_nothing(name):
    model, ids = llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}), torch.randint(0, 97, (2, 60))
    before = logits(model, ids)
    with adapt.patch(model, DENSE[name](), when="prefill") as patch:
        assert patch.mechanism.rotated or patch.mechanism.rope == Rope(500.0)
        assert (logits(model, ids) - before).abs().max() < 1e-4
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize(
    "policy",
    [
        lambda: LongHeads(chunk=16, attend_len=48),
        lambda: Ltri(chunk=16, window=16, sinks=2, top=2, budget=24),
        lambda: ReuseLayers(None, 8, block=16),
    ],
)
def test_a_sparse_policy_is_causal_and_differs_from_softmax(policy):
    model, ids = llama(), torch.randint(0, 97, (1, 160))
    changed = torch.cat((ids[:, :144], (ids[:, 144:] + 1) % 97), 1)
    before, one = logits(model, ids), policy()
    one.calibrate(adapt.record(model, ids[:, :64]))
    with adapt.patch(model, one, when="prefill"):
        first, second = logits(model, ids), logits(model, changed)
    assert torch.allclose(first[:, :128], second[:, :128], atol=1e-5)
    assert (first[:, 140:] - before[:, 140:]).abs().max() > 1e-3 or isinstance(one, ReuseLayers)
    assert torch.equal(logits(model, ids), before)


def test_what_a_policy_cannot_run_is_said():
    model, ids = llama(), torch.randint(0, 97, (1, 20))
    with pytest.raises(RegardError, match="when='prefill'"):
        adapt.patch(model, LongHeads(16, 64))
    with pytest.raises(RegardError, match="calibrate"), adapt.patch(model, ReuseLayers(None, 8), when="prefill"):
        logits(model, ids)
    keep = torch.ones_like(ids)
    keep[:, :3] = 0
    with pytest.raises(RegardError, match="no padding"), adapt.patch(model, LongHeads(16, 64), when="prefill"):
        model(input_ids=ids, attention_mask=keep)
    with pytest.raises(RegardError, match="plain rotary"):
        adapt.patch(
            transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4)), LongHeads(16, 64), when="prefill"
        )


def test_a_prompt_then_decoding_with_the_cache():
    model = models.load("tiny")
    ids = models.encode("def add(a, b):\n    return a")
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    with adapt.patch(model, LongHeads(chunk=16, attend_len=64), when="prefill"):
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), plain)
