"""Conversions: recipes that are interrupted, resumed, refused; converted layers beside padding, packed texts and caches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
import itertools

from regard import RegardError, adapt
from regard.adapt.checkpoint import FILE
from regard.adapt.host import cache_argument
from regard.adapt.kept_state import StateLayer
from regard.adapt.stages import distance, next_token_loss
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.liger import convert_liger, liger_lora
from regard.zoo.systems.lolcats import attention_transfer, convert_lolcats, lora_finetune
from regard.zoo.systems.radlads import radlads_convert


def draw(generator):
    return torch.randint(1, 50, (2, 12), generator=generator)


def recipe():
    return [
        attention_transfer(5, accumulate=2, every=2, patience=0),
        lora_finetune(4, accumulate=1, dropout=0.1),
        adapt.Distil(3, 1e-3, ("*self_attn*",), ce=0.5, clip=1.0),
        adapt.Tune(2, 1e-3, ("*norm*",), optimizer="sgd", schedule="cosine"),
    ]


def converted():
    torch.manual_seed(0)
    model = llama()
    return model, convert_lolcats(model, 4, 5)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("stop", [3, 7, 13])
def test_an_interrupted_recipe_goes_on_as_if_it_had_not_been(tmp_path, stop):
    model, conversion = converted()
    whole = adapt.carry_out(conversion, recipe(), draw, seed=3)
    truth = values(model)
    model, conversion = converted()
    before, drawn = values(model), [0]

    def interrupted(generator):
        drawn[0] += 1
        if drawn[0] > stop + 5 * (stop > 5):
            raise KeyboardInterrupt
        return draw(generator)

    with pytest.raises(KeyboardInterrupt):
        adapt.carry_out(conversion, recipe(), interrupted, seed=3, folder=tmp_path, save_every=2)
    assert same(values(model), before) and not any(".part" in path.name for path in tmp_path.iterdir())
    assert all(type(m).__module__.split(".")[0] != "peft" for m in model.modules()) and not hasattr(model, "peft_config")
    model, conversion = converted()
    again = adapt.carry_out(conversion, recipe(), draw, seed=3, folder=tmp_path, save_every=2)
    assert again.losses == whole.losses and same(values(model), truth)
    model, conversion = converted()  # and what is finished is read at once
    assert adapt.carry_out(conversion, recipe(), None, seed=3, folder=tmp_path).losses == whole.losses and same(values(model), truth)


def test_stages_change_what_they_name_and_nothing_else():
    model, conversion = converted()
    model.train()
    frozen = model.lm_head.weight.requires_grad_(False)
    before, seen = [values(model)], []

    def watch(number, stage):
        before.append(values(model))
        seen.append((number, stage.name, model.training))

    adapt.carry_out(conversion, recipe(), draw, watch=watch)
    moved = [{name for name in a if not torch.equal(a[name], b[name])} for a, b in itertools.pairwise(before)]
    attention = {name for name in before[0] if "self_attn" in name}
    assert moved[0] == {name for name in attention if name.endswith(("query_map", "key_map", "gamma"))}
    assert moved[1] == {name for name in attention if "proj" in name}
    assert moved[2] == attention and moved[3] == {name for name in before[0] if "norm" in name}
    assert seen == [(0, "transfer", False), (1, "lora", False), (2, "distil", False), (3, "tune", False)]
    assert model.training and not frozen.requires_grad and all(p.grad is None for p in model.parameters())


def test_restore_gives_the_model_back():
    model = llama()
    before, parts = values(model), list(model.modules())
    with convert_liger(model) as conversion:
        adapt.carry_out(conversion, [liger_lora(2, accumulate=1)], draw)
    assert same(values(model), before) and list(model.modules()) == parts


def test_lora_is_the_sum_of_what_it_learned():
    model, conversion = converted()
    first = values(model)
    adapt.carry_out(conversion, [lora_finetune(3, 1e-2, rank=2, accumulate=1)], draw)
    name = "model.layers.0.self_attn.q_proj.weight"
    s = torch.linalg.svdvals(values(model)[name] - first[name])
    assert s[1] > 1e-6 and s[2] < 1e-10


def test_losses_by_hand():
    logits, truth, ids = torch.randn(2, 5, 7).double(), torch.randn(2, 5, 7).double(), torch.randint(7, (2, 5))
    p, q = (x.div(2).softmax(-1) for x in (truth, logits))
    assert torch.allclose(distance(logits, truth, 2.0), 4 * (p * (p / q).log()).sum(-1).mean())
    ids[0, 3] = -100
    own = [-logits[b, t].log_softmax(-1)[ids[b, t + 1]] for b in range(2) for t in range(4) if ids[b, t + 1] >= 0]
    assert torch.allclose(next_token_loss(logits, ids), torch.stack(own).mean())


def test_plateau_is_pytorch_s():
    stage = adapt.Transfer(60, 1.0, schedule="plateau", every=1, patience=2, factor=0.5, final_lr=0.1)
    losses = [max(1.0, 5 - 0.7 * t) + 0.1 * (t % 3) for t in range(60)]
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], 1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, min_lr=0.1)
    for step, loss in enumerate(losses):
        assert stage.rate(step, losses[:step]) == optimizer.param_groups[0]["lr"]
        schedule.step(loss)
    assert optimizer.param_groups[0]["lr"] == 0.1
    cosine = adapt.Tune(10, 1.0, schedule="cosine", final_lr=0.2)
    assert cosine.rate(0, []) == 1.0 and abs(cosine.rate(5, []) - 0.6) < 1e-12


def test_bad_recipes_and_folders(tmp_path):
    model, conversion = converted()
    before = values(model)
    for stages, message in (
        ([], "no stages"),
        ([adapt.Stage(1)], "Transfer, Lora"),
        ([adapt.Tune(1, learn=("nothing",))], "none of the model's parameters"),
        ([adapt.Lora(1, targets=("nothing",))], "names no linear layer"),
        ([adapt.Tune(3, 1e9, optimizer="sgd")], "loss of step"),
    ):
        with pytest.raises(RegardError, match=message):
            adapt.carry_out(conversion, stages, draw)
        assert same(values(model), before)
    for options in ({"learn": "x"}, {"schedule": "x"}, {"optimizer": "x"}, {"steps": -1}, {"lr": 0.0}, {"every": 0}):
        with pytest.raises(RegardError, match="expected"):
            adapt.Tune(**{"steps": 1, **options})
    with pytest.raises(RegardError, match="temperature"):
        adapt.Distil(1, temperature=0.0)
    adapt.carry_out(conversion, [adapt.Tune(2, 1e-3)], draw, folder=tmp_path)
    _, other = converted()
    with pytest.raises(RegardError, match="another model, recipe or seed"):
        adapt.carry_out(other, [adapt.Tune(3, 1e-3)], draw, folder=tmp_path)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:100])
    with pytest.raises(RegardError, match="is damaged"):
        adapt.carry_out(other, [adapt.Tune(2, 1e-3)], draw, folder=tmp_path)


def test_what_cannot_be_converted_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

    with pytest.raises(RegardError, match="no attention layers"):
        convert_liger(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9)))
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "vocab_size": 9,
    }
    sliding = MistralForCausalLM(MistralConfig(sliding_window=8, **sizes))
    with pytest.raises(RegardError, match="sliding_window"):
        convert_liger(sliding)
    model = llama()
    for options, message in (
        ({"layers": [5]}, "some of 0 .. 1"),
        ({"kind": "x"}, "one of gla"),
        ({"window": -1}, "window"),
        ({"slots": 0}, "slot"),
    ):
        with pytest.raises(RegardError, match=message):
            convert_liger(model, **options)
    for options in ({"window": 0}, {"feature_dim": 0}, {"form": "x"}, {"stabilise": "x"}):
        with pytest.raises(RegardError, match="expected"):
            convert_lolcats(model, **options)
    convert_liger(model)
    with pytest.raises(RegardError, match="expected an attention layer"):
        convert_liger(model)


KINDS = {
    "lolcats": lambda model: convert_lolcats(model, 4, 5),
    "liger": lambda model: convert_liger(model, "gsa", 4, slots=5),
    "radlads-6": lambda model: radlads_convert(model, "rad_rwkv6"),
    "radlads-7": lambda model: radlads_convert(model, "rad_rwkv7"),
}


@pytest.fixture(params=sorted(KINDS))
def model(request):
    torch.manual_seed(1)
    made = llama()
    KINDS[request.param](made)
    return made


@torch.no_grad()
def test_padding_and_packed_texts_give_what_each_gives_alone(model):
    a, b = torch.randint(1, 50, (1, 9)), torch.randint(1, 50, (1, 5))
    truth = [model(x, use_cache=False).logits for x in (a, b)]
    empty = torch.zeros(1, 4, dtype=torch.long)
    for side, ids in (
        ("left", torch.cat((empty, b), 1)),
        ("right", torch.cat((b, empty), 1)),
        ("inside", torch.cat((b[:, :2], empty, b[:, 2:]), 1)),
    ):
        keep = (ids != 0).long()
        places = (keep.cumsum(1) - 1).clamp_min(0)
        both = torch.cat((a, ids)), torch.cat((torch.ones_like(a), keep))
        out = model(both[0], attention_mask=both[1], position_ids=torch.cat((torch.arange(9)[None], places)), use_cache=False).logits
        assert torch.allclose(out[:1], truth[0], atol=1e-10), side
        assert torch.allclose(out[1:][keep.bool()], truth[1][0], atol=1e-10), side
    packed = model(torch.cat((a, b), 1), position_ids=torch.cat((torch.arange(9), torch.arange(5)))[None], use_cache=False).logits
    assert torch.allclose(packed, torch.cat(truth, 1), atol=1e-10)


@torch.no_grad()
def test_generation_greedy_padded_and_beams(model):
    a, b = torch.randint(1, 50, (1, 9)), torch.randint(1, 50, (1, 5))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone = [model.generate(x, attention_mask=torch.ones_like(x), **options)[0, x.shape[1] :] for x in (a, b)]
    ids = torch.cat((a, torch.cat((torch.zeros(1, 4, dtype=torch.long), b), 1)))
    keep = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    assert torch.equal(model.generate(ids, attention_mask=keep, **options)[:, 9:], torch.stack(alone))
    plain = a
    for _ in range(8):
        plain = torch.cat((plain, model(plain, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(plain[0, 9:], alone[0])
    beams = {"num_beams": 3, **options}
    found = model.generate(a, attention_mask=torch.ones_like(a), **beams)
    assert torch.equal(found, model.generate(a, attention_mask=torch.ones_like(a), use_cache=False, **beams))


@torch.no_grad()
def test_caches_that_cannot_hold_a_state_are_refused(model):
    from transformers import DynamicCache

    name, ids = cache_argument(model), torch.randint(1, 50, (2, 6))
    full = llama()(ids, use_cache=True)[name]
    with pytest.raises(RegardError, match="empty DynamicCache"):
        model(ids, **{name: full}, use_cache=True)
    keep = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    with pytest.raises(RegardError, match="padded on the left"):
        model(ids, attention_mask=keep, **{name: DynamicCache()}, use_cache=True)
    cache = model(ids, use_cache=True)[name]
    layer = cache.layers[0]
    assert isinstance(layer, StateLayer) and layer.bytes > 0 and cache.get_seq_length() == 6
    with pytest.raises(RegardError, match="no rows"):
        cache.crop(-1)
    from regard.cache.rows import keep_rows

    with pytest.raises(RegardError, match="expected layers that keep a key"):
        keep_rows(cache, 3, torch.zeros(2, 1, dtype=torch.long))
    cache.reset()
    assert layer.state is None and cache.get_seq_length() == 0


@torch.no_grad()
def test_half_precision_and_masks_of_eager(model):
    ids = torch.randint(1, 50, (2, 7))
    truth = model(ids, use_cache=False).logits
    model.set_attn_implementation("eager")
    keep = (torch.arange(7) >= torch.tensor([[0], [2]])).long()
    out = model(ids, attention_mask=keep, use_cache=False).logits
    assert torch.allclose(out[0], truth[0], atol=1e-10) and not torch.allclose(out[1], truth[1], atol=1e-3)
    single = copy.deepcopy(model).float()(ids, use_cache=False).logits
    with torch.autocast("cpu", torch.bfloat16):
        auto = copy.deepcopy(model).float()(ids, use_cache=False).logits
    half = model.bfloat16()(ids, use_cache=False).logits
    scale = truth.abs().max()
    assert (single - truth).abs().max() < 1e-3 * scale and half.isfinite().all() and auto.isfinite().all()


def test_some_layers_alone():
    torch.manual_seed(0)
    model = llama()
    plain, ids = copy.deepcopy(model), torch.randint(1, 50, (1, 12))
    conversion = convert_liger(model, window=2, layers=[1])
    assert list(conversion.parts) == ["model.layers.1.self_attn"]
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-3)
        made = model.generate(ids, max_new_tokens=4, do_sample=False)
        whole = ids
        for _ in range(4):
            whole = torch.cat((whole, model(whole, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(made, whole)


def test_parts_that_are_no_attention_and_models_that_are_no_language_models():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).double()
    first = nn.Linear(4, 8).double()
    with adapt.convert(model, lambda part: copy.deepcopy(first), where="0") as conversion:
        report = adapt.carry_out(
            conversion, [adapt.Transfer(200, 2e-2)], lambda generator: {"input": torch.randn(16, 4, generator=generator).double()}
        )
        assert report.losses[0][-1] < 0.1 * report.losses[0][0] and report.stages == ("transfer",)


@torch.no_grad()
def test_models_that_norm_queries_and_keys():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from regard.zoo.systems.dha import to_dha

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "vocab_size": 9,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**sizes)).double().eval()
    for p in model.parameters():
        p.add_(0.5 * torch.randn_like(p))
    ids = torch.randint(9, (2, 7))
    truth = model(ids, use_cache=False).logits
    kinds = (
        lambda: convert_lolcats(model, 7, 5),
        lambda: convert_liger(model, window=6, mix=1.0),
        lambda: to_dha(model, key_heads=[1, 2], value_heads=[2, 1]),
    )
    for make in kinds:
        with make():
            assert torch.allclose(model(ids, use_cache=False).logits, truth, atol=1e-6)  # their norms are computed in float32
    with convert_lolcats(model, 3, 5):
        assert not torch.allclose(model(ids, use_cache=False).logits, truth, atol=1e-2)


def test_lolcats_maps_are_drawn_from_their_seed():
    layers = [
        next(iter(convert_lolcats(llama(), 4, 5, seed=seed, tie=tie).students.values()))
        for seed, tie in ((0, False), (0, False), (1, True))
    ]
    assert torch.equal(layers[0].query_map, layers[1].query_map) and not torch.equal(layers[0].query_map, layers[2].query_map)
    assert torch.equal(layers[0].query_map, layers[0].key_map) and layers[2].query_map is layers[2].key_map
    bound = (6 / (8 * 5)) ** 0.5
    assert 0.8 * bound < float(layers[0].query_map.abs().max()) <= bound and abs(float(layers[0].gamma.sigmoid().mean()) - 0.1) < 1e-7
    fixed = next(iter(convert_lolcats(llama(), 4, 5, train_gamma=False).students.values()))
    assert "gamma" in dict(fixed.named_buffers()) and "gamma" not in dict(fixed.named_parameters())
