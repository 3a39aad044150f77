"""First values, options, half precision and refusals of RADLADS, and its stages."""

import sys

import pytest
import torch

from regard import RegardError, adapt
from regard.adapt.host import cache_argument
from regard.engine import stream
from regard.lab.checks.shared.converting import shaken, student_of, turned
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.radlads import KINDS, output_distance, radlads_convert, radlads_stages


def test_first_values():
    model = llama()
    six, seven = (student_of(radlads_convert(llama(), kind)) for kind in KINDS)
    own = model.model.layers[0].self_attn
    assert own.q_proj.weight.shape == six.q_proj.weight.shape and six.q_proj.weight.dtype == six.mix_b.dtype == torch.float64
    assert float(six.mix_a.abs().max()) == float(six.mu.abs().max()) == float(six.decay.a.abs().max()) == 0 and bool((six.mu_x == 1).all())
    assert six.mix_b.shape == (5, 32, 32) and six.decay.a.shape == (32, 64) and six.gate.a.shape == (32, 128) and six.gate.bias is None
    assert 0.008 < float(six.mix_b.abs().max()) <= 0.01 and 0.008 < float(six.gate.b.abs().max()) <= 0.01
    assert seven.rate.a.shape == (32, 64) and float(seven.rate.bias.abs().max()) == 0 and seven.gate.b.shape == (128, 32)
    spread = torch.linalg.svdvals(seven.gate.b)
    assert torch.allclose(spread, torch.full_like(spread, 0.2))  # 0.1 sqrt(128 / 32)
    assert set(dict(seven.named_parameters())) >= {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"}
    again, other = (student_of(radlads_convert(llama(), "rad_rwkv6", seed=seed)).mix_b for seed in (0, 1))
    assert torch.equal(again, six.mix_b) and not torch.equal(other, again)
    small = student_of(radlads_convert(llama(), "rad_rwkv6", mix_rank=3, decay_rank=5, gate_rank=7))
    assert small.mix_b.shape[1] == 3 and small.decay.a.shape[1] == 5 and small.gate.a.shape[1] == 7


@torch.no_grad()
def test_floor_keeps_decays_up():
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    layer = student_of(radlads_convert(llama(), "rad_rwkv6", floor=-0.01))
    layer.decay.bias.fill_(3.0)
    assert float(layer.mixed(x, x[:, :1], ())[3]["log_decay"].min()) == -0.01
    layer.floor = None
    assert float(layer.mixed(x, x[:, :1], ())[3]["log_decay"].max()) < -1


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_gradients(kind):
    model = llama().float()
    radlads_convert(model, kind)
    ids = torch.randint(1, 50, (2, 11))
    with torch.no_grad():
        truth, half = model(ids, use_cache=False).logits, model.bfloat16()(ids, use_cache=False).logits
    assert float((half.float() - truth).norm()) < 0.1 * float(truth.norm())
    layer = student_of(radlads_convert(llama(), kind))
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    layer.run(x, turned(llama(), x))[0].square().sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in layer.parameters())
    zero = torch.zeros(1, 6, 32, dtype=torch.float64, requires_grad=True)  # keys of length zero
    layer.run(zero, turned(llama(), x))[0].sum().backward()
    assert bool(zero.grad.isfinite().all())


def test_stages():
    found = radlads_stages(3, 2, 1)
    assert [type(stage) for stage in found] == [adapt.Transfer, adapt.Distil, adapt.Tune] and [stage.lr for stage in found] == [
        1e-3,
        1e-5,
        1e-5,
    ]
    assert found[0].rate(0, []) == 1e-3 and found[0].rate(3, []) == pytest.approx(1e-5) and found[0].betas == (0.9, 0.95)
    assert [stage.steps for stage in radlads_stages(0, 2, 0)] == [2]
    y, truth = torch.zeros(1, 2, 4), torch.tensor([[[3.0, 4, 0, 0], [0, 0, 0, 1]]])
    assert float(output_distance(lambda: y, ((), {}, truth))) == pytest.approx((5 + 1) / 2 / 2)


@pytest.mark.parametrize("options", [{"student": "rwkv"}, {"mix_rank": 0}, {"student": "rad_rwkv7", "rate_rank": -1}, {"layers": [7]}])
def test_refusals(options):
    with pytest.raises(RegardError, match="expected"):
        radlads_convert(llama(), **options)


def test_decays_begin_by_channel_and_by_depth():
    for layers in (1, 3):
        for kind, own in (
            ("rad_rwkv6", lambda at, depth: -6 + 5 * at ** (0.7 + 1.3 * depth)),
            ("rad_rwkv7", lambda at, depth: -7 + 5 * at ** (0.85 + depth**0.5) + 0.5),
        ):
            made = radlads_convert(llama(layers=layers), kind)
            for number, layer in enumerate(made.students.values()):
                depth = number / max(1, layers - 1)
                truth = torch.tensor([own(n / 31, depth) for n in range(32)], dtype=torch.float64)
                assert torch.allclose(layer.decay.bias, truth, atol=1e-6)


@pytest.mark.parametrize(("dim", "heads", "ranks"), [(4096, 4, (64, 128)), (4095, 5, (32, 64))])
def test_ranks_of_wide_models(dim, heads, ranks):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=5, hidden_size=dim, **sizes))
    six = student_of(radlads_convert(model, "rad_rwkv6"))
    assert (six.mix_b.shape[1], six.decay.a.shape[1]) == ranks
    model = LlamaForCausalLM(LlamaConfig(vocab_size=5, hidden_size=dim, **sizes))
    assert student_of(radlads_convert(model, "rad_rwkv7")).decay.a.shape[1] == ranks[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_recurrence_is_kept_in_single_precision_under_autocast(kind, monkeypatch):
    layer, seen, real = student_of(radlads_convert(llama().float(), kind)), [], stream.step

    def step(*given, **inputs):
        seen.append(
            torch.is_autocast_enabled("cpu") or {x.dtype for x in (*given[:3], *(v for v in inputs.values() if torch.is_tensor(v)))}
        )
        return real(*given, **inputs)

    monkeypatch.setattr(sys.modules[type(layer).__module__], "step", step)
    x = torch.randn(1, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        layer.run(x, tuple(y.float() for y in turned(llama(), x)))
    assert seen == [{torch.float32}]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_before_a_row_or_behind_it_is_as_if_it_were_not_there(kind):
    torch.manual_seed(0)
    model = llama()
    for student in radlads_convert(model, kind).students.values():
        shaken(student, 0.2)
    ids, keep = torch.randint(1, 50, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    keep[1, :5] = keep[2, 8:] = 0
    places = (keep.cumsum(1) - 1).clamp_min(0)  # as `generate` counts them: decays by channel see where turned keys stand
    truth = [model(row[None, own.bool()], use_cache=False).logits[0] for row, own in zip(ids, keep, strict=True)]
    for padding in (0, 7):
        given = torch.where(keep.bool(), ids, padding)
        found = model(given, attention_mask=keep, position_ids=places, use_cache=False).logits
        for b in range(3):
            assert torch.allclose(found[b, keep[b].bool()], truth[b], atol=1e-9)
    row, own, at = (x[1:2] for x in (torch.where(keep.bool(), ids, 7), keep, places))
    first = model(row[:, :7], attention_mask=own[:, :7], position_ids=at[:, :7], use_cache=True)  # two tokens behind five of padding
    told = {cache_argument(model): first.past_key_values}
    more = model(row[:, 7:], attention_mask=own, position_ids=at[:, 7:], use_cache=True, **told)
    assert torch.allclose(torch.cat((first.logits[0, 5:], more.logits[0])), truth[1], atol=1e-9)
