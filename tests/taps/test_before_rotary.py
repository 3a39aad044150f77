"""Queries and keys before rotary positions: what is read there and turned is what attention takes; edits are turned and reach the cache."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

import regard  # noqa: E402
from regard import adapt, taps  # noqa: E402
from regard.lab.checks.shared.byhand import rotary  # noqa: E402
from regard.nn.images.timm_host import load  # noqa: E402

BASE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "pad_token_id": 0}
GROUPED = {**BASE, "num_key_value_heads": 2, "head_dim": 8}
KINDS = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 4},
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma2": GROUPED,
    "gpt_neox": {**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "phi": {**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
}
PRE = ["q_pre_rotary", "k_pre_rotary"]


def built(kind, **more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**KINDS[kind], **more})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager" if kind == "gemma2" else "sdpa")
    for name, p in model.named_parameters():
        if p.dim() > 1 and "embed" not in name:
            p.data.mul_(3)
    return model.eval()


def batch():
    torch.manual_seed(1)
    ids, keep = torch.randint(3, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    keep[0, :4] = 0
    return {"input_ids": ids, "attention_mask": keep}


def turned(x, places):
    """By hand, the first channels of each head: half of them where the model turns half."""
    return rotary(x.double(), places).float()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_read_and_turned_is_what_attention_takes(kind):
    model, inputs = built(kind), batch()
    places = torch.arange(9)
    own = model(**inputs)[0]
    with taps(model, [*PRE, "q", "k"]) as seen:
        assert torch.equal(model(**inputs, position_ids=places[None].expand(2, -1))[0], own)
    for layer, (pre, post) in ((layer, pair) for layer in range(2) for pair in zip(PRE, "qk", strict=True)):
        before, after = seen[pre, layer], seen[post, layer]
        width = 4 if kind in ("gpt_neox", "phi") else 8
        assert before.shape == (2, 2 if post == "k" and "num_key_value_heads" in KINDS[kind] else 4, 9, 4 if kind == "phi" else 8)
        torch.testing.assert_close(turned(before[..., :width], places), after[..., :width], rtol=1e-4, atol=1e-5)
        if width < before.shape[-1]:
            assert torch.equal(before[..., width:], after[..., width:])
    assert not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(model(**inputs)[0], own)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_edits_are_turned(kind):
    """An edit before rotary positions is the same edit, turned, behind them; other heads, layers and positions stay."""
    model, inputs = built(kind), batch()
    shift = torch.randn(4 if kind == "phi" else 8)
    with taps(model, ["q", "k", "heads"], layers=[1]) as own:
        model(**inputs)
    assert torch.equal(edited(model, inputs, {name: lambda x: x for name in PRE}), model(**inputs)[0])
    with (
        taps.edit(model, {"q_pre_rotary": lambda x: x + shift}, layers=[1], heads=[2], positions=[5, -1]),
        taps(model, ["q", "k"], layers=[1]) as seen,
    ):
        model(**inputs)
    assert torch.equal(seen["k", 1], own["k", 1])
    gap = (seen["q", 1] - own["q", 1])[:, 2, [5, 8]]
    width = 4 if kind in ("gpt_neox", "phi") else 8
    torch.testing.assert_close(gap[1, :, :width], turned(shift[:width].expand(2, -1), torch.tensor([5, 8])), rtol=1e-3, atol=1e-4)
    rest = torch.ones_like(seen["q", 1], dtype=torch.bool)
    rest[:, 2, [5, 8]] = False
    assert torch.equal(seen["q", 1][rest], own["q", 1][rest])
    group = 4 // own["k", 1].shape[1]
    with (
        taps.edit(model, {"k_pre_rotary": torch.zeros_like}, layers=[1], heads=[2, 3] if group == 2 else [2]),
        taps(model, "k", layers=[1]) as seen,
    ):
        model(**inputs)
    zero = (seen["k", 1] == 0)[..., :width].all((0, 2, 3))
    assert zero.tolist() == [at == (1 if group == 2 else 2) for at in range(4 // group)]
    if group == 2:
        with pytest.raises(regard.RegardError, match="share their keys"):
            taps.edit(model, {"k_pre_rotary": torch.zeros_like}, heads=[2])


def edited(model, inputs, edits, **where):
    with taps.edit(model, edits, **where):
        return model(**inputs)[0]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_edits_of_keys_reach_the_cache(kind):
    """Decoding with a cache under an edit gives what a whole pass under it gives; with left padding."""
    model, inputs = built(kind), batch()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    edits = {"k_pre_rotary": lambda x: 1.7 * x, "q_pre_rotary": lambda x: x.flip(-1)}
    with taps(model, PRE, keep="all") as seen:
        plain = model.generate(**inputs, **options)
    assert [x.shape[2] for x in seen.all("k_pre_rotary", 1)] == [9, 1, 1, 1] == [x.shape[2] for x in seen.all("q_pre_rotary", 0)]
    assert torch.equal(model.generate(**inputs, **options), plain)
    with taps.edit(model, edits):
        out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
        keep = torch.cat((inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)), 1)
        whole = model(out.sequences[:, :-1], attention_mask=keep, position_ids=(keep.cumsum(-1) - 1).clamp_min(0)).logits
    for at, logits in enumerate(out.logits):
        torch.testing.assert_close(logits, whole[:, 8 + at], rtol=1e-3, atol=1e-3)
    places = []
    with taps.edit(
        model, {"k_pre_rotary": lambda x, at: (places.append((at.start, x.shape[2], at.heads)), x)[1]}, layers=[0], positions=[-1]
    ):
        model.generate(**inputs, **options)
    assert places == [(0, 1, None), (9, 1, None), (10, 1, None), (11, 1, None)]


@torch.no_grad()
def test_layers_of_this_library():
    torch.manual_seed(0)
    model, ids = regard.nn.Decoder(vocab=30, dim=32, heads=4, kv_heads=2).eval(), torch.randint(30, (2, 7))
    own = model(ids)
    with taps(model, [*PRE, "q", "k"]) as seen:
        assert torch.equal(model(ids), own)
    for pre, post in zip(PRE, "qk", strict=True):
        torch.testing.assert_close(turned(seen[pre, 1], torch.arange(7)), seen[post, 1], rtol=1e-4, atol=1e-5)
    edits = {"k_pre_rotary": lambda x: 1.7 * x, "q_pre_rotary": lambda x: x.flip(-1)}
    with taps.edit(model, edits, layers=[0]):
        whole = model(ids)
        first, state = model.step(ids[:, :4])
        rest, _ = model.step(ids[:, 4:], state)
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, own) and torch.equal(model(ids), own)
    with taps(model, "k_pre_rotary", positions=[-1], keep="all") as seen:
        state = model.step(ids[:, :4])[1]
        model.step(ids[:, 4:], state)
    assert [x.shape for x in seen.all("k_pre_rotary", 0)] == [(2, 2, 1, 8)] * 2


def test_gradients_and_copies():
    model, inputs = built("llama").double(), batch()
    gate = torch.ones(4, 1, 1, dtype=torch.float64, requires_grad=True)
    with taps.edit(model, {"q_pre_rotary": lambda x: x * gate}, layers=[0]):
        (slope,) = torch.autograd.grad(model(**inputs)[0][1].square().mean(), gate)
        with torch.no_grad():
            other = copy.deepcopy(model)
            assert torch.equal(other(**inputs)[0], built("llama").double()(**inputs)[0])  # a copy is nobody's

    def value(step):
        one = torch.zeros(4, 1, 1, dtype=torch.float64).index_fill(0, torch.tensor(2), step)
        with torch.no_grad():
            return float(edited(model, inputs, {"q_pre_rotary": lambda x: x * (1 + one)}, layers=[0])[1].square().mean())

    # Llama's norms compute in float32
    assert float(slope[2]) == pytest.approx((value(1e-2) - value(-1e-2)) / 2e-2, rel=1e-2)


@torch.no_grad()
def test_beside_patches_other_taps_and_errors():
    model, inputs = built("llama"), {"input_ids": torch.randint(3, 97, (2, 9))}
    with adapt.patch(model, "sigmoid"):
        own = model(**inputs)[0]
        with taps(model, PRE) as seen:
            assert torch.equal(model(**inputs)[0], own)
    with (
        taps(model, "q_pre_rotary", layers=[1]) as first,
        taps.edit(model, {"q_pre_rotary": lambda x: x + 1}, layers=[1]),
        taps.edit(model, {"q_pre_rotary": lambda x: 2 * x}, layers=[1]),
        taps(model, "q_pre_rotary", layers=[1]) as last,
    ):
        model(**inputs)
    torch.testing.assert_close(last["q_pre_rotary", 1], 2 * (first["q_pre_rotary", 1] + 1))
    with pytest.raises(ZeroDivisionError), taps.edit(model, {"q_pre_rotary": lambda x: x * (1 / 0)}):
        model(**inputs)
    for function in (lambda x: x[..., :-1], lambda x: x * float("nan"), lambda x: x.double()):
        with pytest.raises(regard.RegardError, match="q_pre_rotary"), taps.edit(model, {"q_pre_rotary": function}):
            model(**inputs)
    assert not any("forward" in vars(m) for m in model.modules())
    assert taps.plan(model, PRE, length=9, batch=2).bytes == sum(x.numel() * 4 for _, x in [*seen.items(PRE[0]), *seen.items(PRE[1])])
    model.model.layers[0].self_attn.forward = model.model.layers[0].self_attn.forward
    with pytest.raises(regard.RegardError, match="forward of its own"), taps(model, PRE):
        pass
    assert all(m.__dict__.get("config") is None or not isinstance(m.config, adapt.host.Routed) for m in model.modules())


def test_models_without_rotary_positions_refuse():
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    gpt2 = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("gpt2", **sizes))
    bert = transformers.AutoModel.from_config(transformers.AutoConfig.for_model("bert", **BASE))
    vit = load("timm").create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    plain = regard.nn.Decoder(vocab=30, dim=32, heads=4, rope=False)
    for model in (gpt2, bert, vit, plain):
        with pytest.raises(regard.RegardError, match="expected the points q and k"):
            taps(model, "q_pre_rotary")
    torch.manual_seed(0)
    half = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("smollm3", **{**GROUPED, "no_rope_layers": [1, 0], "bos_token_id": 1, "eos_token_id": 2})
    )
    with torch.no_grad(), taps(half, PRE, layers=[0]) as seen:
        half(torch.randint(3, 97, (1, 5)))
    assert seen["q_pre_rotary", 0].shape == (1, 4, 5, 8)
    with pytest.raises(regard.RegardError, match="turned no queries"), taps(half, PRE):
        half(torch.randint(3, 97, (1, 5)))
