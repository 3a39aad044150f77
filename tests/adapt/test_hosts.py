"""Many model families: softmax under a patch is the model itself, the future stays unseen, and what cannot be patched is refused."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import regard  # noqa: E402
from regard import adapt  # noqa: E402
from regard.algebra import Mechanism  # noqa: E402

BASE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
BASE |= {"max_position_embeddings": 64, "pad_token_id": 0}
GROUPED = {**BASE, "num_key_value_heads": 2, "head_dim": 8}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 16, "patch_size": 4}
SEQUENCE = {"vocab_size": 97, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
SEQUENCE |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
CAUSAL = {
    "llama": GROUPED,
    "qwen3": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 4},
    "gemma3_text": {**GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention"]},
    "llama4_text": {
        **GROUPED,
        "attention_chunk_size": 4,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "layer_types": ["chunked_attention"],
    },
    "gpt_neox": BASE,
    "gptj": {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    "opt": {**BASE, "ffn_dim": 32, "word_embed_proj_dim": 32},
    "phi": BASE,
    "doge": {**GROUPED, "keep_window_size": 64},
    "granite_swa": GROUPED,
}
ENCODERS = {
    "bert": BASE,
    "roberta": BASE,
    "electra": {**BASE, "embedding_size": 32},
    "modernbert": {**BASE, "local_attention": 4, "global_attn_every_n_layers": 2, "num_hidden_layers": 2},
    "layoutlm": BASE,
    "vit": IMAGE,
    "beit": {**IMAGE, "use_relative_position_bias": True, "use_mask_token": False},
    "siglip_vision_model": IMAGE,
    "swin": {
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "window_size": 2,
        "image_size": 16,
        "patch_size": 2,
        "num_channels": 3,
    },
}
BOTH = {"bart": SEQUENCE, "marian": {**SEQUENCE, "decoder_start_token_id": 0}, "mbart": SEQUENCE}


def built(kind, how="sdpa"):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**CAUSAL, **ENCODERS, **BOTH, **OUTSIDE}[kind])
    loader = transformers.AutoModelForCausalLM if kind in CAUSAL else transformers.AutoModel
    if kind == "siglip_vision_model":
        return transformers.SiglipVisionModel._from_config(config, attn_implementation=how).eval()
    return loader.from_config(config, attn_implementation=how).eval()


def batch(kind, model):
    if "patch_size" in {**ENCODERS}.get(kind, ()):
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    ids, keep = torch.randint(3, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    keep[0, :4] = 0
    more = {"decoder_input_ids": ids[:, :6]} if kind in BOTH else {}
    return {"input_ids": ids, "attention_mask": keep, **more}


def real(kind, inputs, out):
    return out if kind in BOTH or "attention_mask" not in inputs else out[inputs["attention_mask"].bool()]


OUTSIDE = {
    "falcon": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "alibi": False},
    "gpt_neo": {"vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 1, "n_head": 4},
    "bigbird_pegasus": {**SEQUENCE, "attention_type": "original_full"},
    "pegasus_x": SEQUENCE,
    "nllb-moe": {**SEQUENCE, "num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "big_bird": BASE,
    "splinter": BASE,
}


@pytest.mark.parametrize("how", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [*CAUSAL, *ENCODERS, *BOTH])
@torch.no_grad()
def test_softmax_is_the_model_itself(kind, how):
    if how == "sdpa" and kind == "granite_swa":
        pytest.skip("transformers runs it eagerly only")
    model = built(kind, how)
    inputs = batch(kind, model)
    want = real(kind, inputs, model(**inputs)[0])
    with adapt.patch(model, "softmax"):
        torch.testing.assert_close(real(kind, inputs, model(**inputs)[0]), want, atol=2e-5, rtol=2e-4)
    with adapt.patch(model, "relu"):
        assert (real(kind, inputs, model(**inputs)[0]) - want).abs().max() > 1e-5
    assert torch.equal(real(kind, inputs, model(**inputs)[0]), want)


@pytest.mark.parametrize("kind", OUTSIDE)
def test_models_outside_the_interface(kind):
    with pytest.raises(regard.RegardError, match=r"has no attention layer|computes attention itself|supports only attention of its own"):
        adapt.patch(built(kind, "eager"), "softmax")


def names():
    return [name for name in regard.names() if isinstance(regard.get(name), Mechanism)]


# What a prompt reads is chosen for the whole of it (policies for prompts): never later keys, but which earlier ones.
CHOOSES_AHEAD = ("dhsa", "flexprefill", "hip", "hyperattention", "neighborhood", "proxyattn")
CHOOSES_AHEAD += ("routing-transformer", "sampleattention", "spargeattn")


@pytest.mark.parametrize("name", names())
@torch.no_grad()
def test_the_future_is_not_seen(name):
    """Changing later tokens changes nothing before them, or the mechanism is refused."""
    model, ids = built("llama"), torch.randint(3, 97, (1, 24))
    other = torch.cat((ids[:, :17], (ids[:, 17:] + 5) % 97), 1)
    try:
        patch = adapt.patch(model, name)
    except regard.RegardError as why:
        assert "does not run causally" in str(why) or "projection of the layer" in str(why)
        return
    with patch:
        got, changed = (model(x, use_cache=False).logits[:, :17] for x in (ids, other))
    if name not in CHOOSES_AHEAD:
        torch.testing.assert_close(got, changed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "vit"])
@pytest.mark.parametrize("name", names())
@torch.no_grad()
def test_encoders_see_everything(name, kind):
    """Under a patch the last token still reaches the first, or the mechanism is refused as causal."""
    model = built(kind)
    inputs = batch(kind, model)
    try:
        patch = adapt.patch(model, name)
    except regard.RegardError as why:
        assert "is causal by itself" in str(why) or "projection of the layer" in str(why)
        return
    if name in ("neighborhood", "routing-transformer"):
        return  # a token sees a part of the sequence by design
    with patch:
        try:
            before = model(**inputs)[0]
            changed = dict(inputs)
            if kind == "vit":
                changed["pixel_values"] = inputs["pixel_values"].clone()
                changed["pixel_values"][:, :, 12:, 12:] += 1
            else:
                changed["input_ids"] = inputs["input_ids"].clone()
                changed["input_ids"][:, -1] = (changed["input_ids"][:, -1] + 5) % 90 + 3
            after = model(**changed)[0]
        except regard.RegardError:
            return  # a grid or a length the mechanism does not take: said clearly
    first = 4 if kind == "bert" else 0
    assert (before[0, first] - after[0, first]).abs().max() > 0


def test_causal_states_are_refused_where_the_model_is_not_causal():
    for kind, name in (
        ("bert", "lightning-attention"),
        ("vit", "transnormerllm"),
        ("bert", "moba"),
        ("bart", "swat"),
        ("bert", "delta-attention"),
    ):
        with pytest.raises(regard.RegardError, match="is causal by itself"):
            adapt.patch(built(kind), name)
    with pytest.raises(regard.RegardError, match=r"numbers \[0, 2\]"):
        adapt.patch(built("bart"), "agent-attention")
    adapt.patch(built("bart"), "agent-attention", layers=[0, 2]).restore()
    with pytest.raises(regard.RegardError, match="does not run causally"):
        adapt.patch(built("llama"), "sinkformer")
    with pytest.raises(regard.RegardError, match="does not run causally"):
        adapt.patch(built("llama"), "flowformer")


@torch.no_grad()
def test_a_state_over_a_padded_encoder():
    """A bidirectional recurrence in BERT: each row gives what it gives alone."""
    model, ids, keep = built("bert"), torch.randint(3, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    keep[0, 5:] = 0
    with adapt.patch(model, "hedgehog"):
        got = model(input_ids=ids, attention_mask=keep)[0]
        torch.testing.assert_close(got[0, :5], model(input_ids=ids[:1, :5])[0][0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "phi", "bert"])
@pytest.mark.parametrize("name", ["softmax", "sigmoid", "hedgehog", "entmax"])
def test_autocast(kind, name):
    """bfloat16 autocast, where rotary positions leave q in float32 and v in bfloat16: values near float32's, gradients of parameters."""
    model = built(kind)
    inputs = {"input_ids": torch.randint(3, 97, (2, 9))}
    with adapt.patch(model, name):
        want = model(**inputs)[0]
        with torch.autocast("cpu", torch.bfloat16):
            got = model(**inputs)[0]
        got.float().square().mean().backward()
    assert (got.float() - want).abs().max() < 0.05 * want.abs().max() + 0.02
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_flash_and_flex_masks_are_read():
    """Masks of two dimensions are flash attention's padding; other objects are refused with what to do."""
    from regard.adapt.sight import look

    keep = torch.tensor([[0, 1, 1, 1, 1]])
    seen = look(keep, 5, 5, True, "flash_attention_2", 3, True)
    want = [[bool(keep[0, j]) and 0 <= i - j < 3 for j in range(5)] for i in range(5)]
    assert seen.causal and seen.shown[0, 0].tolist() == want
    assert look(None, 2, 5, True, "flash_attention_2", None, True).first == 3
    with pytest.raises(regard.RegardError, match="set_attn_implementation"):
        look(object(), 5, 5, True, "flex_attention", None, True)
