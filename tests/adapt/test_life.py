"""The life of a patch: shared configs, copies, changes underneath, models that are dropped, parts that are left alone."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch

transformers = pytest.importorskip("transformers")
import loops  # noqa: E402

import regard  # noqa: E402
from regard import adapt  # noqa: E402

IDS = torch.arange(3, 15)[None]
BART = {"vocab_size": 97, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_two_models_of_one_config(how):
    first = loops.llama(how)
    second = transformers.LlamaForCausalLM(first.config).eval()
    before = logits(first), logits(second)
    patch = adapt.patch(first, "relu")
    assert torch.equal(logits(second), before[1]) and not torch.allclose(logits(first), before[0], atol=1e-3)
    other = adapt.patch(second, "sigmoid")
    patch.restore()
    assert torch.equal(logits(first), before[0]) and not torch.allclose(logits(second), before[1], atol=1e-3)
    other.restore()
    assert torch.equal(logits(second), before[1])


@pytest.mark.parametrize("how", ["sdpa", "eager"])
@pytest.mark.parametrize("by", ["deepcopy", "pickle", "save"])
def test_a_copy_is_the_plain_model(how, by, tmp_path):
    model = loops.llama(how)
    before = logits(model)
    with adapt.patch(model, "relu"):
        patched = logits(model)
        if by == "deepcopy":
            twin = copy.deepcopy(model)
        elif by == "pickle":
            twin = pickle.load(io.BytesIO(pickle.dumps(model)))
        else:
            model.save_pretrained(tmp_path)
            twin = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=how).eval()
        assert torch.equal(logits(twin), before) and twin.config._attn_implementation == how
        assert all(type(m.config) is type(model.config) for m in twin.modules() if hasattr(m, "config"))
        with adapt.patch(twin, "sigmoid"):
            assert not torch.allclose(logits(twin), before, atol=1e-3) and torch.equal(logits(model), patched)
    assert torch.equal(logits(model), before) and torch.equal(logits(twin), before)


@pytest.mark.parametrize(("one", "other"), [("sdpa", "eager"), ("eager", "sdpa")])
def test_another_implementation_underneath(one, other):
    model = loops.llama(one)
    before = logits(model)
    patch = adapt.patch(model, "relu")
    patched = logits(model)
    model.set_attn_implementation(other)
    torch.testing.assert_close(logits(model), patched, atol=1e-5, rtol=1e-4)
    patch.restore()
    assert model.config._attn_implementation == other
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)
    model.set_attn_implementation(one)
    assert torch.equal(logits(model), before)


def test_a_dropped_model_is_gone():
    model = loops.llama()
    patch, config, seen = adapt.patch(model, "entmax"), model.config, weakref.ref(model)
    logits(model)
    del model, patch
    gc.collect()
    assert seen() is None
    fresh = transformers.LlamaForCausalLM(config)
    assert config._attn_implementation == "sdpa" and logits(fresh).isfinite().all()


def test_nothing_stays_after_restore():
    model = loops.llama()
    state = [(name, dict(vars(module))) for name, module in model.named_modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    patch = adapt.patch(model, "relu")
    patch.restore(), patch.restore()
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert all(vars(module)[key] is value for (_, kept), module in zip(state, model.modules(), strict=True) for key, value in kept.items())


@pytest.mark.parametrize("how", ["sdpa", "eager"])
@torch.no_grad()
def test_what_is_left_alone_runs_as_ever(how):
    """Heads, layers and phases outside a patch give bit for bit what the model gives, padding and caches included."""
    model, keep = loops.llama(how), torch.ones(2, 12, dtype=torch.long)
    ids, keep[0, :5] = torch.randint(3, 97, (2, 12)), 0
    heard = {}

    def listen(at):
        return lambda module, args: heard.setdefault(at, []).append(args[0])

    for at, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(listen(at))
    inputs = {"input_ids": ids, "attention_mask": keep}
    model(**inputs)
    own = {at: found.pop() for at, found in heard.items()}
    with adapt.patch(model, "relu", layers=[1]):
        model(**inputs)
    assert torch.equal(heard[0].pop(), own[0]) and not torch.equal(heard[1].pop(), own[1])
    with adapt.patch(model, "relu", heads=[1], layers=[0]):
        model(**inputs)
    got, want = heard[0].pop().unflatten(-1, (4, 8)), own[0].unflatten(-1, (4, 8))
    assert torch.equal(got[..., [0, 2, 3], :], want[..., [0, 2, 3], :]) and not torch.equal(got[..., 1, :], want[..., 1, :])
    with adapt.patch(model, "relu", when="decode"):
        model(**inputs)
    assert torch.equal(heard[0].pop(), own[0])


@pytest.mark.parametrize("kind", ["bart", "whisper"])
@torch.no_grad()
def test_encoder_and_decoder_of_different_head_counts(kind):
    torch.manual_seed(0)
    more = {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
    if kind == "bart":
        model = transformers.BartModel(transformers.BartConfig(**BART, **more)).eval()
        inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :6]}
    else:
        sizes = {"num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 16, "pad_token_id": 0}
        model = transformers.WhisperModel(transformers.WhisperConfig(**{**BART, **more, **sizes, "decoder_start_token_id": 1})).eval()
        inputs = {"input_features": torch.randn(1, 8, 12), "decoder_input_ids": IDS[:, :6]}
    want = model(**inputs).last_hidden_state
    with adapt.patch(model, "entmax") as patch:  # an alpha a head
        assert [
            made.learned["alpha_raw"].numel() if "alpha_raw" in made.learned else next(made.parameters()).numel() for made in patch.inputs
        ] == [4, 2, 2]
        assert not torch.allclose(model(**inputs).last_hidden_state, want, atol=1e-4)
    with adapt.patch(model, "softmax", heads=[1]):
        torch.testing.assert_close(model(**inputs).last_hidden_state, want, atol=1e-5, rtol=1e-4)
    with pytest.raises(regard.RegardError, match=r"heads=.3.; expected some of 0 .. 1"):
        adapt.patch(model, "softmax", heads=[3])
    assert torch.equal(model(**inputs).last_hidden_state, want)


def test_a_module_that_does_not_call_its_attention():
    model = loops.llama()
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **rest: (hidden_states, None)
    with adapt.patch(model, "softmax"), pytest.raises(regard.RegardError, match="without calling its attention function"):
        logits(model)
    assert logits(model).isfinite().all()
