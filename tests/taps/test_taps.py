"""The contract of taps, over model families: what is read is what the model computes, edits act where they say and nowhere else."""

import copy

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

import regard  # noqa: E402
from regard import adapt, taps  # noqa: E402
from regard.nn.images.timm_host import load  # noqa: E402

BASE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
BASE |= {"max_position_embeddings": 64, "pad_token_id": 0}
GROUPED = {**BASE, "num_key_value_heads": 2, "head_dim": 8}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 16, "patch_size": 4}
SEQUENCE = {"vocab_size": 97, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
SEQUENCE |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
KINDS = {
    "llama": GROUPED,
    "gemma3_text": {**GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma2": {**GROUPED, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "mistral": {**GROUPED, "sliding_window": None},
    "qwen3": GROUPED,
    "phi": {**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "gpt_neox": BASE,
    "opt": {**BASE, "ffn_dim": 32, "word_embed_proj_dim": 32},
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "bert": BASE,
    "vit": IMAGE,
    "bart": SEQUENCE,
    "mbart": SEQUENCE,
    "t5": {"vocab_size": 97, "d_model": 32, "num_layers": 1, "d_ff": 64, "num_heads": 4, "d_kv": 8, "dropout_rate": 0.0},
}
DECODERS = ("llama", "gemma3_text", "gemma2", "mistral", "qwen3", "phi", "gpt_neox", "opt", "gpt2")
BOTH = ("bart", "mbart", "t5")
EVERY = list(taps.POINTS)


def built(kind, how="sdpa", **more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**KINDS[kind], **more})
    loader = transformers.AutoModelForCausalLM if kind in DECODERS else transformers.AutoModel
    model = loader.from_config(config, attn_implementation="eager" if kind == "gemma2" else how).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1 and "embed" not in name:
            p.data.mul_(3)
    return model


def batch(kind):
    torch.manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    ids, keep = torch.randint(3, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    keep[0, :4] = 0
    return {"input_ids": ids, "attention_mask": keep, **({"decoder_input_ids": ids[:, :6]} if kind in BOTH else {})}


def points(kind):
    """gpt_neox's branches are parallel; not all have rotary positions."""
    turned = kind in ("llama", "gemma3_text", "gemma2", "gpt_neox", "mistral", "qwen3", "phi")
    return [x for x in EVERY if not (kind in ("gpt_neox", "phi") and x == "residual_mid") and (turned or "rotary" not in x)]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_reading_changes_no_bit_and_leaves_nothing(kind):
    model, inputs = built(kind), batch(kind)
    before = {name: (dict(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    own = model(**inputs)[0]
    with taps(model, [*points(kind), taps.ColumnMass(), taps.Top(2)]) as seen:
        assert torch.equal(model(**inputs)[0], own)
    for layer in range(3):
        assert all((point, layer) in seen for point in (*points(kind), "column_mass", "top"))
    with taps.edit(model, dict.fromkeys(points(kind), lambda x: x)):
        real = inputs["attention_mask"].bool() if kind in DECODERS else slice(None)  # padding may attend to anything
        torch.testing.assert_close(model(**inputs)[0][real], own[real], rtol=1e-4, atol=1e-4)
    with pytest.raises(ZeroDivisionError), taps.edit(model, {"q": lambda x: x * (1 / 0)}):
        model(**inputs)
    assert torch.equal(model(**inputs)[0], own)
    for name, m in model.named_modules():
        kept, hooks, pre_hooks = before[name]
        assert set(vars(m)) == set(kept) and len(m._forward_hooks) == hooks and len(m._forward_pre_hooks) == pre_hooks
        assert vars(m).get("config") is kept.get("config")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_weights_are_those_of_plain_attention(kind):
    model, inputs = built(kind), batch(kind)
    plain = built(kind, "eager")
    out = plain(**inputs, output_attentions=True)
    names = ("encoder_attentions", "decoder_attentions", "cross_attentions") if kind in BOTH else ("attentions",)
    truth = [p for name in names for p in out[name]]
    with taps(model, ["q", "k", "logits", "weights", "heads", "v"]) as seen:
        model(**inputs)
    for layer, p in enumerate(truth):
        w = seen["weights", layer]
        real = torch.ones(w.shape[0], w.shape[2], dtype=torch.bool)
        if "attention_mask" in inputs and w.shape[2] == 9:
            real = inputs["attention_mask"].bool()
        torch.testing.assert_close(w.transpose(1, 2)[real], p.transpose(1, 2)[real], rtol=1e-4, atol=1e-5)
        seeing = w.sum(-1) > 0
        torch.testing.assert_close(seen["logits", layer].softmax(-1)[seeing], w[seeing])
        v = seen["v", layer].repeat_interleave(4 // seen["v", layer].shape[1], 1)
        torch.testing.assert_close((w @ v)[seeing], seen["heads", layer][seeing], rtol=1e-4, atol=1e-4)
        if kind not in ("gemma2", "opt", "t5"):  # a softcap; scaled queries; a bias, and no scale
            k = seen["k", layer].repeat_interleave(4 // seen["k", layer].shape[1], 1)
            s = seen["q", layer] @ k.mT * 8**-0.5
            shown = seen["logits", layer].isfinite()
            torch.testing.assert_close(seen["logits", layer][shown], s[shown] if "gemma" not in kind else s[shown] * (8 / 256) ** 0.5)


def projection(model, kind, layer):
    names = {"llama": "model.layers.{}.self_attn.o_proj", "gpt2": "transformer.h.{}.attn.c_proj"}
    names |= {**dict.fromkeys(("gemma3_text", "gemma2", "mistral", "qwen3"), names["llama"]), "phi": "model.layers.{}.self_attn.dense"}
    names |= {"bert": "encoder.layer.{}.attention.output.dense"}
    names |= {"gpt_neox": "gpt_neox.layers.{}.attention.dense", "opt": "model.decoder.layers.{}.self_attn.out_proj"}
    names |= {
        "vit": "layers.{}.attention.o_proj",
        "bart": "encoder.layers.{}.self_attn.out_proj",
        "mbart": "encoder.layers.{}.self_attn.out_proj",
        "t5": "encoder.block.{}.layer.0.SelfAttention.o",
    }
    return model.get_submodule(names[kind].format(layer))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_heads_are_ablated_as_their_columns_of_the_projection(kind):
    model, inputs, layer = built(kind), batch(kind), 0 if kind in BOTH else 1
    own, other = model(**inputs)[0], copy.deepcopy(model)
    weight = projection(other, kind, layer).weight
    (weight.T if kind != "gpt2" else weight)[8:16] = 0
    truth = other(**inputs)[0]
    assert not torch.allclose(truth, own)
    for point in ("heads", "weights"):
        with taps.edit(model, {point: torch.zeros_like}, layers=[layer], heads=[1]):
            torch.testing.assert_close(model(**inputs)[0], truth, rtol=1e-4, atol=1e-4)
    with taps.edit(model, {"heads": torch.zeros_like}, layers=[layer], heads=[1]), taps(model, "heads", layers=[layer]) as seen:
        model(**inputs)
    assert bool((seen["heads", layer][:, 1] == 0).all()) and bool((seen["heads", layer][:, [0, 2, 3]] != 0).any())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("gpt_neox", "phi", *BOTH)])
@torch.no_grad()
def test_the_stream_is_the_model_s(kind):
    """in + attention = mid (pre-norm); out of a layer is in of the next; an edit of each point acts as the same edit one point later."""
    model, inputs = built(kind), batch(kind)
    with taps(model, ["residual_in", "residual_mid", "residual_out", "out", "mlp"]) as seen:
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    for layer in range(3):
        assert torch.equal(seen["residual_in", layer], hidden[layer])
        if layer < 2:
            assert torch.equal(seen["residual_out", layer], hidden[layer + 1])
        if kind in ("llama", "mistral", "qwen3", "opt", "gpt2", "vit"):
            torch.testing.assert_close(seen["residual_mid", layer], seen["residual_in", layer] + seen["out", layer])
            torch.testing.assert_close(seen["residual_out", layer], seen["residual_mid", layer] + seen["mlp", layer], rtol=1e-4, atol=1e-4)

    def outcome(point, layer):
        with taps.edit(model, {point: lambda x: torch.full_like(x, 0.3)}, layers=[layer]):
            return model(**inputs)[0]

    torch.testing.assert_close(outcome("residual_out", 0), outcome("residual_in", 1))
    shift = torch.randn(32)
    if kind in ("llama", "mistral", "qwen3", "opt", "gpt2", "vit"):
        with taps.edit(model, {"out": lambda x: x + shift}, layers=[1]):
            by_out = model(**inputs)[0]
        with taps.edit(model, {"residual_mid": lambda x: x + shift}, layers=[1]):
            torch.testing.assert_close(model(**inputs)[0], by_out, rtol=1e-4, atol=1e-4)
    with taps.edit(model, {"residual_mid": lambda x: 0 * x}, layers=[2]), taps(model, ["residual_mid", "mlp", "residual_out"]) as seen:
        model(**inputs)
    assert float(seen["residual_mid", 2].abs().max()) < 1e-4
    if kind in ("llama", "mistral", "qwen3", "opt", "gpt2", "vit"):
        torch.testing.assert_close(seen["residual_out", 2], seen["mlp", 2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_generation_with_a_cache_and_left_padding(kind):
    model, inputs = built(kind), batch(kind)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    own = model.generate(**inputs, **options)
    with taps(model, ["weights", "heads", taps.Top(1)], keep="all") as seen:
        assert torch.equal(model.generate(**inputs, **options), own)
    calls = seen.all("weights", 1)
    assert [tuple(w.shape[2:]) for w in calls[1:]] == [(1, 10 + at) for at in range(3)]
    full = {"input_ids": own[:, :-1], "attention_mask": F.pad(inputs["attention_mask"], (0, 3), value=1)}
    if kind != "opt":
        full["position_ids"] = (full["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with taps(model, "weights") as whole:
        model(**full)
    for at, w in enumerate(calls[1:]):
        torch.testing.assert_close(w[:, :, 0], whole["weights", 1][:, :, 9 + at, : w.shape[-1]], rtol=1e-3, atol=1e-4)
        values, keys = seen.all("top", 1)[1 + at]
        torch.testing.assert_close(values[..., 0], w.amax(-1))
        assert torch.equal(w.gather(-1, keys), values)
    # place 10 of the sequence is the second token that is generated
    with taps(model, "heads", positions=[8, -1], keep="all") as seen:
        model(**inputs)
    with pytest.raises(regard.RegardError, match="positions holds 10"), taps(model, "heads", positions=[10]):
        model(**inputs)
    marked = []
    with taps.edit(model, {"heads": lambda x, at: (marked.append((at.start, x.shape[2])), x)[1]}, layers=[0], positions=[-1]):
        model.generate(**inputs, **options)
    assert marked == [(0, 1), (9, 1), (10, 1), (11, 1)]


@torch.no_grad()
def test_padding_is_not_counted():
    model, inputs = built("llama"), batch("llama")
    with taps(model, ["weights", taps.ColumnMass()]) as seen:
        model(**inputs)
    alone = {"input_ids": inputs["input_ids"][:1, 4:]}
    with taps(model, taps.ColumnMass()) as own:
        model(**alone)
    torch.testing.assert_close(seen["column_mass", 0][:1, :, 4:], own["column_mass", 0], rtol=1e-4, atol=1e-5)
    right = {"input_ids": inputs["input_ids"][:1, 4:].repeat(2, 1), "attention_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2])}
    with taps(model, taps.ColumnMass()) as own:
        model(**right)
    torch.testing.assert_close(own["column_mass", 0].sum(-1), torch.tensor([[5.0], [3.0]]).expand(2, 4))


@torch.no_grad()
def test_reductions_are_those_of_the_map(monkeypatch):
    from regard.taps import station

    model, ids = built("llama"), torch.randint(3, 97, (2, 13))
    some = torch.rand(2, 13) > 0.5
    asked = [
        taps.ColumnMass(),
        taps.Mass([0, -1]),
        taps.Mass(some, "some"),
        taps.Top(3),
        taps.Entropy(),
        taps.MeanDistance(),
        taps.Pooled(4),
    ]
    monkeypatch.setattr(station, "CHUNK", 2 * 4 * 13 * 5)
    with taps(model, asked, layers=[1], heads=[0, 1, 3]) as seen, taps(model, "weights", layers=[1], heads=[0, 1, 3]) as maps:
        model(ids)
    w = maps["weights", 1]
    torch.testing.assert_close(seen["column_mass", 1], w.sum(2))
    torch.testing.assert_close(seen["mass", 1], w[..., 0] + w[..., 12])
    torch.testing.assert_close(seen["some", 1], (w * some[:, None, None]).sum(-1))
    torch.testing.assert_close(seen["top", 1][0], w.topk(3).values)
    torch.testing.assert_close(seen["entropy", 1], -(w * w.clamp_min(1e-30).log()).sum(-1), rtol=1e-4, atol=1e-5)
    far = torch.tensor([[abs(i - j) for j in range(13)] for i in range(13)])
    torch.testing.assert_close(seen["mean_distance", 1], (w * far).sum(-1))
    pooled = torch.stack(
        [torch.stack([w[..., i : i + 4, j : j + 4].mean((-2, -1)) for j in range(0, 13, 4)], -1) for i in range(0, 13, 4)], -2
    )
    torch.testing.assert_close(seen["pooled", 1], pooled)
    with taps.edit(model, {"weights": lambda p: p.flip(-1)}, layers=[1]), taps(model, asked[0], layers=[1]) as flipped:
        model(ids)
    with taps(model, "weights", layers=[1]) as maps:
        model(ids)
    torch.testing.assert_close(flipped["column_mass", 1], maps["weights", 1].sum(2).flip(-1))


def test_gradients_go_through_edits_and_maps():
    model, ids = regard.nn.Decoder(vocab=30, dim=16, heads=4, kv_heads=2).double(), torch.randint(30, (2, 7))

    def loss(edits, **where):
        with taps.edit(model, edits, layers=[0], **where):
            return model(ids).square().mean()

    def difference(edits_of):
        with torch.no_grad():
            return (float(loss(edits_of(1e-5))) - float(loss(edits_of(-1e-5)))) / 2e-5

    for point, axes in (
        ("heads", (4, 1, 1)),
        ("q", (4, 1, 1)),
        ("v", (2, 1, 1)),
        ("weights", (4, 1, 1)),
        ("residual_mid", (7, 1)),
        ("mlp", (7, 1)),
    ):
        gate = torch.ones(axes, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss({point: lambda x: x * gate}), gate)
        for at in range(axes[0]):
            one = torch.zeros(axes, dtype=torch.float64).index_fill(0, torch.tensor(at), 1.0)
            assert float(slope[at]) == pytest.approx(difference(lambda step: {point: lambda x: x * (1 + step * one)}), rel=1e-4, abs=1e-10)
    with taps(model, ["logits", "weights"], layers=[0], graph=True) as seen:
        total = model(ids).square().mean()
    slopes = torch.autograd.grad(total, [seen["logits", 0], seen["weights", 0]])
    for point, slope in zip(("logits", "weights"), slopes):
        bump = torch.zeros_like(slope)
        bump[1, 2, 5, 3] = 1.0
        assert float(slope[1, 2, 5, 3]) == pytest.approx(difference(lambda step: {point: lambda p: p + step * bump}), rel=1e-4)


@torch.no_grad()
def test_edits_compose_in_order_and_reads_see_what_came_before_them():
    model, inputs = built("llama"), batch("llama")
    for point in ("q", "weights", "heads", "mlp", "residual_mid"):
        with (
            taps(model, point, layers=[1]) as first,
            taps.edit(model, {point: lambda x: x + 1}, layers=[1]),
            taps.edit(model, {point: lambda x: x * 2}, layers=[1]),
            taps(model, point, layers=[1]) as last,
        ):
            model(**inputs)
        torch.testing.assert_close(last[point, 1], (first[point, 1] + 1) * 2, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_positions_and_heads_alone_are_edited():
    model, inputs = built("llama"), batch("llama")
    with taps(model, "heads", layers=[1]) as own:
        model(**inputs)
    for point in ("logits", "weights", "heads"):
        with (
            taps.edit(model, {point: torch.zeros_like}, layers=[1], heads=[2], positions=[3, -1]),
            taps(model, "heads", layers=[1]) as seen,
        ):
            model(**inputs)
        same = seen["heads", 1] == own["heads", 1]
        assert bool(same[:, [0, 1, 3]].all()) and bool(same[:, 2, [0, 1, 2, 4, 5, 6, 7]].all()) and not bool(same[1, 2, [3, 8]].any())


@torch.no_grad()
def test_heads_and_positions_come_in_the_order_asked_for():
    model, inputs = built("llama"), {"input_ids": torch.randint(3, 97, (2, 9))}
    order, places = [3, 0, 2, 1], [8, *range(8)]
    with taps(model, ["logits", "weights", taps.ColumnMass()], layers=[1]) as own:
        model(**inputs)
    with (
        taps(model, ["logits", "weights", "heads"], layers=[1], heads=order, positions=places) as seen,
        taps(model, taps.ColumnMass(), layers=[1], heads=order) as mass,
    ):
        model(**inputs)
    for point in ("logits", "weights"):
        torch.testing.assert_close(seen[point, 1], own[point, 1][:, order][:, :, places])
    torch.testing.assert_close(mass["column_mass", 1], own["column_mass", 1][:, order])


@torch.no_grad()
def test_taps_stand_above_patches():
    model, inputs = built("llama"), {"input_ids": torch.randint(3, 97, (2, 9))}
    with adapt.patch(model, "sigmoid"):
        own = model(**inputs)[0]
        with taps(model, ["weights", "heads", "v"]) as seen:
            assert torch.equal(model(**inputs)[0], own)
        with taps.edit(model, {"weights": lambda p: 2 * p}, layers=[0]), taps(model, "heads", layers=[0]) as doubled:
            model(**inputs)
        with pytest.raises(regard.RegardError, match="no logits"), taps(model, "logits"):
            model(**inputs)
    torch.testing.assert_close(seen["weights", 0] @ seen["v", 0].repeat_interleave(2, 1), seen["heads", 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(doubled["heads", 0], 2 * seen["heads", 0], rtol=1e-4, atol=1e-4)
    with taps(model, "heads") as seen, adapt.patch(model, "sigmoid"):  # entered the other way round: the same
        model(**inputs)
    assert not any(hasattr(m, "_attn_implementation") for m in model.modules())
    torch.testing.assert_close(seen["heads", 0], doubled["heads", 0] / 2, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(**inputs)[0], own)


@torch.no_grad()
def test_mechanisms_named_by_the_config_are_what_is_seen():
    model, inputs = built("llama"), {"input_ids": torch.randint(3, 97, (2, 9))}
    model.set_attn_implementation("regard:sigmoid")
    own = model(**inputs)[0]
    with taps(model, ["weights", "heads", "v"]) as seen:
        assert torch.equal(model(**inputs)[0], own)
    torch.testing.assert_close(seen["weights", 0] @ seen["v", 0].repeat_interleave(2, 1), seen["heads", 0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seen["weights", 0].sum(-1), torch.ones(2, 4, 9))
    with pytest.raises(regard.RegardError, match="no logits"), taps(model, "logits"):
        model(**inputs)
    model.set_attn_implementation("regard")
    with taps(model, "weights") as seen:
        model(**inputs)
    torch.testing.assert_close(seen["weights", 0].sum(-1), torch.ones(2, 4, 9))


@torch.no_grad()
def test_a_vision_language_model():
    """A ViT's layers first, then the decoder's; generation with an image."""
    torch.manual_seed(0)
    vision = {**IMAGE, "num_hidden_layers": 2, "model_type": "clip_vision_model", "projection_dim": 32}
    text = {**GROUPED, "num_hidden_layers": 2, "model_type": "llama", "vocab_size": 99}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=98)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    inputs = {"pixel_values": torch.randn(1, 3, 16, 16), "input_ids": torch.tensor([[3, *[98] * 16, 5, 7, 9]])}
    own = model(**inputs).logits
    with taps(model, ["q", "weights", "heads", "v"]) as seen, taps(model, ["k_pre_rotary", "residual_mid"], layers=[2, 3]) as more:
        assert torch.equal(model(**inputs).logits, own)
    assert [tuple(seen["weights", at].shape) for at in range(4)] == [(1, 4, 17, 17)] * 2 + [(1, 4, 20, 20)] * 2
    assert more["k_pre_rotary", 3].shape == (1, 2, 20, 8)
    for layer in range(4):
        v = seen["v", layer].repeat_interleave(4 // seen["v", layer].shape[1], 1)
        torch.testing.assert_close(seen["weights", layer] @ v, seen["heads", layer], rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.generate(**inputs, **options)
    with taps(model, "weights", layers=[0, 3], keep="all") as steps:
        assert torch.equal(model.generate(**inputs, **options), plain)
    assert len(steps.all("weights", 0)) == 1 and [w.shape[2:] for w in steps.all("weights", 3)] == [(20, 20), (1, 21), (1, 22)]
    for layer, module in ((0, "vision_tower"), (2, "language_model")):
        with taps.edit(model, {"heads": torch.zeros_like}, layers=[layer], heads=[1]):
            cut = model(**inputs).logits
        other = copy.deepcopy(model)
        name = next(
            n for n, _ in other.named_modules() if module in n and n.endswith(("layers.0.self_attn.out_proj", "layers.0.self_attn.o_proj"))
        )
        other.get_submodule(name).weight[:, 8:16] = 0
        torch.testing.assert_close(other(**inputs).logits, cut, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(cut, own)
    with pytest.raises(regard.RegardError, match="no rotary"), taps(model, "q_pre_rotary"):
        pass


@torch.no_grad()
def test_timm_vision_transformers():
    timm = load("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, depth=2, init_values=0.5).eval()
    x = torch.randn(2, 3, 32, 32)
    own = model(x)
    with taps(model, [x for x in EVERY if "rotary" not in x]) as seen:
        assert torch.equal(model(x), own)
    w, attn = seen["weights", 1], model.blocks[1].attn
    q, k, v = attn.qkv(model.blocks[1].norm1(seen["residual_in", 1])).view(2, 5, 3, 3, 64).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(w, (q @ k.mT / 8).softmax(-1))
    torch.testing.assert_close(seen["heads", 1], w @ v)
    torch.testing.assert_close(seen["out", 1], attn.proj((w @ v).transpose(1, 2).flatten(2)))
    torch.testing.assert_close(seen["residual_mid", 1], seen["residual_in", 1] + 0.5 * seen["out", 1])
    with taps.edit(model, {"heads": torch.zeros_like}, layers=[1], heads=[2]):
        cut = model(x)
    attn.proj.weight[:, 128:] = 0
    torch.testing.assert_close(model(x), cut, rtol=1e-4, atol=1e-5)
    for block in model.blocks:
        block.attn.fused_attn = False
    with pytest.raises(regard.RegardError, match="fused_attn"), taps(model, "weights"):
        pass
    assert "forward" not in vars(model.blocks[0].attn)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "gla"])
@torch.no_grad()
def test_regard_s_own_models(name):
    model, ids = (
        regard.nn.Decoder(name, vocab=30, dim=16, heads=4, kv_heads=2 if name == "softmax" else None).eval(),
        torch.randint(30, (2, 7)),
    )
    own = model(ids)
    every = [x for x in EVERY if (x != "logits" or name == "softmax") and ("rotary" not in x or taps.sites(model)[0].unturned is None)]
    with taps(model, every) as seen:
        assert torch.equal(model(ids), own)
    v = seen["v", 1].repeat_interleave(4 // seen["v", 1].shape[1], 1)
    torch.testing.assert_close(seen["weights", 1] @ v, seen["heads", 1], rtol=1e-4, atol=1e-5)
    with taps(model, ["q", "heads", "mlp"], keep="all") as steps:
        assert torch.equal(model.generate(ids, 3), copy.deepcopy(model).generate(ids, 3))
    torch.testing.assert_close(steps.all("heads", 1)[0], seen["heads", 1], rtol=1e-4, atol=1e-5)
    assert [x.shape[2] for x in steps.all("q", 0)] == [7, 1, 1, 1]
    with taps.edit(model, {"heads": torch.zeros_like}, layers=[0], heads=[3]):
        cut = model(ids)
        torch.testing.assert_close(model.step(ids)[0], cut, rtol=1e-4, atol=1e-5)
        assert torch.equal(copy.deepcopy(model)(ids), own)  # a copy is nobody's
    assert not torch.allclose(cut, own) and torch.equal(model(ids), own)
    with pytest.raises(regard.RegardError, match="step"), taps(model, "weights"):
        model.generate(ids, 1)


def test_bad_input_is_refused_before_anything_runs():
    model, inputs = built("llama"), batch("llama")
    wrong = [
        ({"points": "wieghts"}, "point 'wieghts'.*Did you mean weights"),
        ({"points": []}, "points is empty"),
        ({"points": "q", "layers": [3]}, "layers"),
        ({"points": "q", "heads": [4]}, "heads"),
        ({"points": "q", "heads": []}, "heads"),
        ({"points": "q", "positions": [0.5]}, "positions"),
        ({"points": "q", "keep": "some"}, "keep"),
        ({"points": ["q", "q"]}, "each point once"),
        ({"points": [taps.Mass([0]), taps.Mass([1])]}, "different names"),
        ({"points": None}, "points=None"),
    ]
    for options, message in wrong:
        with pytest.raises(regard.RegardError, match=message):
            taps(model, **options)
    for edits, message in (({}, "edits"), ({"q": 3}, "function"), ({"keys": abs}, "point 'keys'")):
        with pytest.raises(regard.RegardError, match=message):
            taps.edit(model, edits)
    with pytest.raises(regard.RegardError, match=r"share their keys and values with heads \[1\]"):
        taps.edit(model, {"k": torch.zeros_like}, heads=[0])
    with pytest.raises(regard.RegardError, match="attention"):
        taps(torch.nn.Linear(3, 3), "q")
    for function, message in (
        (lambda x: x[..., :-1], "shape"),
        (lambda x: x.double(), "float64"),
        (lambda x: x * float("nan"), "not finite"),
        (lambda x: None, "NoneType"),
    ):
        for point in ("q", "weights", "heads", "mlp"):
            with pytest.raises(regard.RegardError, match=message), taps.edit(model, {point: function}, layers=[1]):
                model(**inputs)
    for made, message in (
        (lambda: taps.Top(0), r"Top\(count\)=0"),
        (lambda: taps.Top(1.5), r"Top\(count\)=1.5"),
        (lambda: taps.Pooled(0), r"Pooled\(block\)=0"),
        (lambda: taps.Behind(-1), r"Behind\(back\)=-1"),
        (lambda: taps.Mass([0.5]), "whole numbers"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            made()
    for keys in ([9], [-10], torch.ones(3, 9, dtype=torch.bool), torch.ones(10, dtype=torch.bool), torch.ones(2, 1, 9, dtype=torch.bool)):
        with pytest.raises(regard.RegardError, match=r"Mass\(keys\)"), taps(model, taps.Mass(keys)):
            model(**inputs)
    with pytest.raises(regard.RegardError, match="pairs"):
        regard.interpret.ablated(model, [3])
    seen = taps(model, "q").seen
    with pytest.raises(regard.RegardError, match="nothing was seen"):
        seen["q", 0]
    gpt = built("gpt_neox")
    with pytest.raises(regard.RegardError, match="not its input plus attention"), taps(gpt, "residual_mid"):
        gpt(**inputs)


@torch.no_grad()
def test_half_precision_and_autocast():
    model, inputs = built("llama"), batch("llama")
    with taps(model, "weights") as truth:
        model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        own = model(**inputs)[0]
        with taps(model, ["weights", "heads", "residual_mid"]) as seen:
            assert torch.equal(model(**inputs)[0], own)
        with taps.edit(model, {"weights": lambda p: p}), taps(model, "residual_mid"):
            torch.testing.assert_close(model(**inputs)[0], own, rtol=0.1, atol=0.5)
    assert seen["weights", 0].dtype == torch.float32
    torch.testing.assert_close(seen["weights", 0], truth["weights", 0], rtol=0.1, atol=0.05)
    half = model.to(torch.bfloat16)
    with taps.edit(half, {"weights": lambda p: p}), taps(half, "heads") as seen:
        half(**inputs)
    assert seen["heads", 0].dtype == torch.bfloat16 and bool(seen["heads", 0].isfinite().all())


@pytest.mark.parametrize("point", ["out", "residual_in", "residual_mid", "residual_out"])
def test_a_step_says_what_it_does_not_pass(point):
    model = regard.nn.Decoder("softmax", dim=16, layers=1, heads=2)
    tokens = torch.randint(1, 200, (1, 5))
    with regard.taps(model, [point]) as seen:
        model(tokens)
        assert seen[point, 0].shape == (1, 5, 16)
        with pytest.raises(regard.RegardError, match=f"{point} are not seen in a step"):
            model.step(tokens)
    with regard.taps(model, ["heads", "mlp"]) as whole:
        model(tokens)
    with regard.taps(model, ["heads", "mlp"]) as seen:
        model.step(tokens)
    for name in ("heads", "mlp"):
        torch.testing.assert_close(seen[name, 0], whole[name, 0], rtol=1e-4, atol=1e-5)
