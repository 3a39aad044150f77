"""Mechanisms inside Hugging Face models built from their configs with random weights."""

import pytest
import torch

import regard

transformers = pytest.importorskip("transformers")
from regard import adapt  # noqa: E402

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 97}
CAUSAL = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2)),
    "qwen": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL, num_key_value_heads=2)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97)),
}
ENCODERS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
    "vit": lambda: transformers.ViTModel(
        transformers.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=32, patch_size=8)
    ),
}


POLICIES = {
    "flexprefill": {"block_size": 4, "min_budget": 4},
    "delta-attention": {"stride": 4},
    "pbs-attn": {"block_size": 4, "segment": 8},
    "hyperattention": {"block_size": 4, "samples": 0, "min_length": 8},
}


def built(name):
    torch.manual_seed(0)
    return ({**CAUSAL, **ENCODERS}[name])().eval()


def batch(name):
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    ids = torch.randint(0, 97, (2, 17))
    keep = torch.ones(2, 17, dtype=torch.long)
    keep[0, :5] = 0  # left padding
    return {"input_ids": ids, "attention_mask": keep}


@torch.no_grad()
def output(model, inputs):
    return model(**inputs)[0]


@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS])
def test_softmax_changes_nothing_and_restore_is_exact(name):
    model, inputs = built(name), batch(name)
    before, state = output(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
    keep = inputs.get("attention_mask", torch.ones(before.shape[:2])).bool()
    with adapt.patch(model, "softmax"):
        torch.testing.assert_close(output(model, inputs)[keep], before[keep], atol=2e-5, rtol=1e-4)
    with adapt.patch(model, "sigmoid"):
        assert (output(model, inputs)[keep] - before[keep]).abs().max() > 1e-4
    assert torch.equal(output(model, inputs), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", CAUSAL)
def test_generate_with_cache_equals_without(name):
    model, inputs = built(name), batch(name)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with adapt.patch(model, "softpick"):
        cached = model.generate(**inputs, **options, use_cache=True)
        assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


@pytest.mark.parametrize("name", ["flexprefill", "delta-attention", "pbs-attn", "hyperattention"])
@pytest.mark.parametrize("model", CAUSAL)
def test_prefill_policies_under_left_padding(model, name):
    """A padded row gives the logits of the row alone; generate prefills with the policy and decodes with softmax."""
    built_model, inputs = built(model), batch(model)
    with adapt.patch(built_model, regard.get(name, **POLICIES[name]), when="prefill") as patch:
        padded = output(built_model, inputs)
        assert patch.when == "prefill" and torch.isfinite(padded[inputs["attention_mask"].bool()]).all()
        alone = output(built_model, {"input_ids": inputs["input_ids"][1:]})
        torch.testing.assert_close(padded[1:], alone, atol=2e-5, rtol=1e-4)
        assert built_model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 21)


def test_layers_heads_and_when():
    model, inputs = built("llama"), batch("llama")
    before = output(model, inputs)
    with adapt.patch(model, "relu", layers=[0]):
        one = output(model, inputs)
    with adapt.patch(model, "relu"):
        both = output(model, inputs)
    with adapt.patch(model, "relu", heads=[0, 1, 2, 3]):
        torch.testing.assert_close(output(model, inputs), both)
    with adapt.patch(model, "relu", heads=[1]):
        assert not torch.equal(output(model, inputs), both) and not torch.equal(output(model, inputs), before)
    with adapt.patch(model, "relu", when="decode"):
        torch.testing.assert_close(output(model, inputs)[1], before[1], atol=2e-5, rtol=1e-4)
    assert not torch.equal(one, both) and not torch.equal(one, before)


def test_patches_stack_and_come_off_in_any_order():
    model, inputs = built("llama"), batch("llama")
    before = output(model, inputs)
    first, second = adapt.patch(model, "relu"), adapt.patch(model, "sigmoid")
    both = output(model, inputs)
    first.restore()
    assert torch.equal(output(model, inputs), both)
    second.restore()
    assert torch.equal(output(model, inputs), before)


def test_learned_inputs_belong_to_the_patch_and_get_gradients():
    model, inputs = built("llama"), batch("llama")
    with adapt.patch(model, "entmax") as patch:
        assert len(patch.inputs) == 2
        model(**inputs)[0].square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in patch.inputs.parameters())


def test_distilled_maps_come_closer_to_softmax():
    torch.manual_seed(0)
    model, ids = built("llama"), torch.randint(0, 97, (4, 24))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(12)  # random models have flat weights, which need no distilling
            layer.self_attn.k_proj.weight.mul_(12)
    before = output(model, {"input_ids": ids})
    with adapt.patch(model, "hedgehog") as patch:
        raw = (output(model, {"input_ids": ids}) - before).square().mean()
        losses = adapt.distil(patch, [{"input_ids": ids}], steps=150)
        tuned = (output(model, {"input_ids": ids}) - before).square().mean()
    assert len(losses) == 2 and tuned < 0.8 * raw
    assert torch.equal(output(model, {"input_ids": ids}), before)


@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_distilling_a_padded_batch_is_distilling_its_rows(how):
    """Losses of a padded batch are those of its rows, one after another, alone."""
    model, ids, keep = built("llama"), torch.randint(0, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    model.set_attn_implementation(how)
    keep[0, :4] = 0
    places = (keep.cumsum(-1) - 1).clamp_min(0)
    with adapt.patch(model, "hedgehog") as one, adapt.patch(model, "hedgehog") as other:
        other.inputs.load_state_dict(one.inputs.state_dict())
        together = adapt.distil(other, [{"input_ids": ids, "attention_mask": keep, "position_ids": places}], steps=1)
    with adapt.patch(model, "hedgehog") as one:
        first = adapt.distil(one, [{"input_ids": ids[:1, 4:]}], steps=1)
    assert first == pytest.approx(together, rel=1e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: adapt.patch(m, "softmax", layers=[2]), "layers=.2.; expected some of 0 .. 1"),
        (lambda m: adapt.patch(m, "softmax", heads=[]), "heads=.*expected some"),
        (lambda m: adapt.patch(m, "softmax", when="never"), "when='never'"),
        (lambda m: adapt.patch(m, "gla"), "is a projection of the layer's x"),
        (lambda m: adapt.patch(torch.nn.Linear(2, 2), "softmax"), "Linear has no attention layer"),
        (lambda m: adapt.distil(adapt.patch(m, "relu"), []), "no learned inputs"),
    ],
)
def test_errors(call, words):
    with pytest.raises(regard.RegardError, match=words):
        call(built("llama"))
