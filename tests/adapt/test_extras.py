"""What models add to their attention (softcaps, sinks, biases, dropout) under a patch, and what is refused by name."""

import math

import pytest
import torch

transformers = pytest.importorskip("transformers")
import loops  # noqa: E402

import regard  # noqa: E402
from regard import adapt  # noqa: E402
from regard.algebra import Bias, Causal, Rope, Softcap, Weighted, softmax, with_sinks  # noqa: E402

TEXT = {**loops.SMALL, "vocab_size": 97, "head_dim": 8, "max_position_embeddings": 64}
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
MODELS = {  # what their attention has beside q, k, v and a mask
    "gemma2 softcap": ("gemma2", "AutoModelForCausalLM", {**TEXT, "sliding_window": 4, "attn_logit_softcapping": 1.0}),
    "vaultgemma softcap": ("vaultgemma", "AutoModelForCausalLM", {**TEXT, "sliding_window": 4, "attn_logit_softcapping": 1.0}),
    "gpt_oss sinks": ("gpt_oss", "AutoModelForCausalLM", {**TEXT, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "granite_swa sinks": ("granite_swa", "AutoModelForCausalLM", TEXT),
    "t5 bias": ("t5", "AutoModelForSeq2SeqLM", T5),
    "umt5 bias": ("umt5", "AutoModelForSeq2SeqLM", T5),
}


def built(name, how):
    kind, loader, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, loader).from_config(transformers.AutoConfig.for_model(kind, **options), attn_implementation=how).eval()
    for at, p in model.named_parameters():
        if "sinks" in at:
            p.data.normal_()
        elif p.dim() > 1 and "embed" not in at:
            p.data.mul_(3)
    return model


def batch(model):
    ids, keep = torch.randint(3, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    keep[0, :4] = 0
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": keep, **more}


@pytest.mark.parametrize("how", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_softmax_is_the_model_itself(name, how):
    if how == "sdpa" and "bias" not in name:
        pytest.skip("transformers runs it eagerly only")
    model = built(name, how)
    inputs = batch(model)
    real = slice(None) if model.config.is_encoder_decoder else inputs["attention_mask"].bool()
    want = model(**inputs).logits
    with adapt.patch(model, "softmax"):
        torch.testing.assert_close(model(**inputs).logits[real], want[real], atol=3e-5, rtol=3e-4)
    for mechanism in ("sigmoid", "relu"):
        with adapt.patch(model, mechanism):
            assert (model(**inputs).logits[real] - want[real]).abs().max() > 1e-3
    if model.config.is_encoder_decoder:
        for mechanism in (Weighted(position=Rope()), "hedgehog"):
            with pytest.raises(regard.RegardError), adapt.patch(model, mechanism):
                model(**inputs)


def truth(q, k, v, weight, divide, cap=None, bias=None, sinks=None):
    """float64 loops over causal pairs: weight(s, n) of n visible keys, over the sum of these and the sink's if `divide`."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                s = [float(q[b, h, i].double() @ k[b, h, j].double()) * q.shape[-1] ** -0.5 for j in range(i + 1)]
                s = s if cap is None else [cap * math.tanh(x / cap) for x in s]
                s = s if bias is None else [x + float(bias[0, h, i, j]) for j, x in enumerate(s)]
                w = [weight(x, i + 1) for x in s]
                total = sum(w) + (0 if sinks is None else weight(float(sinks[h]), i + 1))
                out[b, h, i] = sum((x / (total if divide else 1)) * v[b, h, j].double() for j, x in enumerate(w))
    return out


@pytest.mark.parametrize("executor", [None, "tiled", "reference"])
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_softcap_bias_and_sinks_are_parts(name, executor):
    q, k, v = (torch.randn(2, 2, 7, 4) for _ in range(3))
    bias, sinks = torch.randn(1, 2, 7, 7), torch.tensor([0.7, -1.2])
    base = regard.get(name)
    one = Weighted(position=(Softcap(1.5), Bias()), normalizer=with_sinks(base.normalizer))
    got = regard.attend(q, k, v, one, mask=Causal(), position_bias=bias, sink_logits=sinks.reshape(1, 2, 1, 1), executor=executor)
    weight = (lambda x, n: math.exp(x)) if name == "softmax" else lambda x, n: 1 / (1 + math.exp(math.log(n) - x))
    want = truth(q, k, v, weight, name == "softmax", 1.5, bias, sinks)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("far", [-150.0, 150.0])
def test_sinks_far_from_every_score(far):
    q, k, v = (torch.randn(1, 1, 5, 4, requires_grad=True) for _ in range(3))
    sinks = torch.full((1, 1, 1, 1), far, requires_grad=True)
    out = regard.attend(q, k, v, Weighted(normalizer=with_sinks(softmax())), sink_logits=sinks)
    out.square().sum().backward()
    plain = regard.attend(q, k, v) if far < 0 else torch.zeros_like(out)
    assert torch.allclose(out, plain, atol=1e-6) and all(x.grad.isfinite().all() for x in (q, k, v, sinks))


def test_sinks_of_what_has_no_sum():
    for name in ("entmax", "sinkformer", "clipped-softmax"):
        with pytest.raises(regard.RegardError, match="sinks join"):
            with_sinks(regard.get(name).normalizer)


def attention_of(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, softcap=None, turned=None, **rest):
    """An eager attention that reads an argument nobody knows."""
    raise AssertionError("not called")


def test_unknown_arguments_are_refused_by_name(monkeypatch):
    model, ids = loops.llama(), torch.randint(3, 97, (1, 5))
    home = transformers.models.llama.modeling_llama
    monkeypatch.setattr(home, "eager_attention_forward", attention_of)
    with adapt.patch(model, "softmax"):
        model(ids)
        with pytest.raises(regard.RegardError, match=r"turned=\.\.\."):
            model(ids, turned=torch.ones(1))
        with pytest.raises(regard.RegardError, match=r"block_indices=\.\.\."):
            model(ids, block_indices=torch.ones(1))


@torch.no_grad()
def test_chosen_keys_are_a_mask():
    """`indices` (B, Lq, n), keys each query may read, as DeepSeek's indexer gives them; those after the query are hidden anyway."""
    model, ids = loops.llama(), torch.randint(3, 97, (1, 8))
    some = torch.stack([torch.tensor([0, i, max(0, i - 2)]) for i in range(8)])[None]
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    for i in range(8):
        mask[0, 0, i, [0, i, max(0, i - 2)]] = True
    want = model(ids, attention_mask=mask, use_cache=False).logits
    with adapt.patch(model, "softmax"):
        torch.testing.assert_close(model(ids, indices=some, use_cache=False).logits, want, atol=3e-5, rtol=3e-4)
        assert not torch.allclose(model(ids, use_cache=False).logits, want, atol=1e-3)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "alibi", "hedgehog"])
def test_float_masks_are_biases(name):
    """A model that adds to its scores through its mask: ALiBi's slopes, BEiT's tables."""
    mechanism = loops.FORMULA[name][0] if name == "alibi" else name
    model, ids = loops.llama("eager"), torch.randint(3, 97, (1, 6))
    bias = torch.randn(1, 4, 6, 6)
    hidden = torch.ones(6, 6).triu(1).bool()
    mask = bias.masked_fill(hidden, torch.finfo(torch.float32).min)
    with torch.no_grad(), adapt.patch(model, mechanism):
        if name == "hedgehog":
            with pytest.raises(regard.RegardError, match="a position bias"):
                model(ids, attention_mask=mask)
            return
        got = model(ids, attention_mask=mask, use_cache=False).logits

    def attention(module, query, key, value, attention_mask, scaling=None, **rest):
        k, v = (x.repeat_interleave(2, 1) for x in (key, value))
        s = query @ k.mT * scaling + bias
        back = torch.arange(6)[:, None] - torch.arange(6)
        s = s - 0.25 * back.abs() if name == "alibi" else s
        p = (
            torch.where(hidden, 0.0, torch.sigmoid(s - torch.arange(1, 7.0).log()[:, None]))
            if name == "sigmoid"
            else s.masked_fill(hidden, -torch.inf).softmax(-1)
        )
        return (p @ v).transpose(1, 2), None

    transformers.AttentionInterface.register("biased", attention)
    model.set_attn_implementation("biased")
    with torch.no_grad():
        torch.testing.assert_close(got, model(ids, use_cache=False).logits, atol=3e-5, rtol=3e-4)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "hedgehog", "running state"])
@torch.no_grad()
def test_weights_are_given(name):
    """Weights times values is the output, in a padded batch too; a layer left alone gives its own."""
    model, keep = loops.llama("eager"), torch.ones(2, 7, dtype=torch.long)
    ids, keep[0, :3] = torch.randint(3, 97, (2, 7)), 0
    heard = []
    value = model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda m, i, o: heard.append(o))
    out = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, i: heard.append(i[0]))
    own = model(ids, attention_mask=keep, output_attentions=True).attentions
    heard.clear()
    with adapt.patch(model, loops.FORMULA[name][0] if name in loops.FORMULA else name, layers=[0]):
        found = model(ids, attention_mask=keep, output_attentions=True).attentions
    value.remove(), out.remove()
    assert len(found) == 2 and found[0].shape == (2, 4, 7, 7) and found[0].triu(1).abs().max() == 0
    v = heard[0].view(2, 7, 2, 8).transpose(1, 2).repeat_interleave(2, 1)
    got = heard[1].view(2, 7, 4, 8).transpose(1, 2)
    real = keep.bool()[:, None, :, None]
    torch.testing.assert_close(torch.where(real, found[0] @ v, 0.0), torch.where(real, got, 0.0), atol=1e-5, rtol=1e-4)
    assert name == "softmax" or not torch.allclose(found[0], own[0], atol=1e-3)
    with adapt.patch(model, "delta-attention", layers=[0]), pytest.raises(regard.RegardError, match="output_attentions"):
        model(ids, output_attentions=True)


@pytest.mark.parametrize("name", ["softmax", "running state"])
def test_dropout_in_training(name):
    """Weights are dropped with the model's rate and the rest is scaled: on average nothing changes; in eval mode nothing is dropped."""
    model, ids = loops.llama(attention_dropout=0.4), torch.randint(3, 97, (1, 8))
    heard = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, i: heard.append(i[0].detach()))
    with adapt.patch(model, loops.FORMULA[name][0]):
        model(ids)
        still = heard.pop()
        model.train()
        model.model(ids.expand(500, -1))
        model.eval()
    seen = heard.pop()
    assert (seen[0] - still).abs().max() > 1e-3  # it drops
    spread = seen.std(0) / len(seen) ** 0.5
    assert ((seen.mean(0) - still).abs() < 5 * spread + 1e-6).all()
    model.train()
    with adapt.patch(model, "delta-attention"), pytest.raises(regard.RegardError, match=r"dropout=0\.4"):
        model(ids)
