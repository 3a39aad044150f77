"""regard's decoder as a transformers model: saved and loaded by the Auto classes, generated with, trained, padded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from regard import RegardError
from regard.models.causal_lm import CACHE, RegardCache, RegardConfig, RegardForCausalLM

MODELS = {
    "softmax": {"mechanism": "softmax", "num_key_value_heads": 1},
    "softpick": {"mechanism": "softpick"},
    "gla": {"mechanism": "gla"},
    "moba": {"mechanism": "moba", "options": {"block_size": 4, "top_k": 2}},
    "mixed": {"mechanism": ["gla", "softmax"], "options": [{"gate_rank": 4}, {}]},
    "mega": {"mechanism": "mega"},
}
PADDED = [name for name in MODELS if name != "mega"]


def model_of(name):
    torch.manual_seed(0)
    return RegardForCausalLM(RegardConfig(hidden_size=32, num_attention_heads=2, vocab_size=64, **MODELS[name])).eval()


@pytest.fixture
def ids():
    return torch.randint(1, 64, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_and_generation(name, ids, tmp_path):
    model = model_of(name)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() and AutoConfig.from_pretrained(tmp_path).mechanism == MODELS[name]["mechanism"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, RegardForCausalLM) and torch.equal(again(ids).logits, model(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found, without = model.generate(ids, **options), model.generate(ids, use_cache=False, **options)
    cur = ids
    for _ in range(5):
        cur = torch.cat((cur, model.decoder(cur)[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, cur) and torch.equal(without, cur)


@pytest.mark.parametrize("name", PADDED)
def test_padded_rows_are_what_they_are_alone(name, ids):
    model, mask = model_of(name), torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=mask, **options)
    for row, start in ((0, 0), (1, 4)):
        assert torch.equal(found[row, start:], model.generate(ids[row : row + 1, start:], **options)[0])
    other = ids.clone()
    other[1, :4] = 7
    torch.testing.assert_close(model(other, attention_mask=mask).logits[1, 4:], model(ids, attention_mask=mask).logits[1, 4:])


def test_loss_cache_and_output(ids):
    model = model_of("gla")
    labels = ids.clone()
    labels[:, :3] = -100
    out = model(ids, labels=labels)
    truth = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, truth)
    first = model(ids[:, :6])
    cache = first[CACHE]
    assert isinstance(cache, RegardCache) and cache.get_seq_length() == 6 and cache.bytes > 0
    held = cache.bytes
    rest = model(ids[:, 6:], **{CACHE: cache})
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), 1), model(ids, use_cache=False).logits)
    assert cache.get_seq_length() == 11 and cache.bytes == held  # the state of a recurrence does not grow
    assert model(ids, logits_to_keep=2).logits.shape == (2, 2, 64)
    assert isinstance(model(ids, return_dict=False), tuple)


def test_trainer_trains_it(tmp_path, ids):
    model = model_of("gla").train()
    data = [{"input_ids": row, "labels": row} for row in ids.repeat(4, 1)]
    before = float(model(ids, labels=ids).loss)
    arguments = TrainingArguments(
        tmp_path, max_steps=8, learning_rate=3e-2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    Trainer(model=model, args=arguments, train_dataset=data).train()
    assert float(model(ids, labels=ids).loss) < before - 0.3


def test_embeddings_are_resized_and_tied(ids):
    model = model_of("softmax")
    before = model(ids).logits
    model.resize_token_embeddings(70)
    assert model(ids).logits.shape[-1] == 70 and model.config.vocab_size == 70
    torch.testing.assert_close(model(ids).logits[..., :64], before)


def test_refused(ids):
    model = model_of("gla")
    with pytest.raises(RegardError, match="use_cache=False"):
        model.generate(ids, num_beams=2, max_new_tokens=2, pad_token_id=0)
    assert model.generate(ids, num_beams=2, max_new_tokens=2, pad_token_id=0, use_cache=False).shape == (2, 13)
    with pytest.raises(RegardError, match="names 1 layers"):
        RegardForCausalLM(RegardConfig(mechanism=["gla"], num_hidden_layers=2))
    with pytest.raises(RegardError, match="Did you mean"):
        RegardForCausalLM(RegardConfig(mechanism="sofpick"))
    with pytest.raises(RegardError, match="inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(2, 11, 32))
    with pytest.raises(RegardError, match="position_ids"):
        model(ids, position_ids=torch.zeros_like(ids))
    assert model(ids, output_hidden_states=False).logits.shape == (2, 11, 64)
    with pytest.raises(RegardError, match="expected 12: all so far"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), **{CACHE: model(ids)[CACHE]})
    with pytest.raises(RegardError, match="attention_mask has shape"):
        model(ids, attention_mask=torch.ones(2, 1, 11, 11))
    with pytest.raises(RegardError, match="takes no mask"):
        model_of("mega")(ids, attention_mask=torch.tensor([[1] * 11, [0] * 4 + [1] * 7]))
