"""DuoAttention: the loss of gates against a model whose mask is drawn by hand, their schedule, and which heads stream."""

import pytest
import torch

pytest.importorskip("transformers")
from regard import RegardError
from regard.cache import KIVI
from regard.cache.packed import Form, Packed
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.duoattention import DuoAttention, identify_heads


def batch(asked=(3, 7, 19)):
    ids, there = torch.randint(1, 50, (2, 20)), torch.zeros(2, 20, dtype=torch.bool)
    there[:, list(asked)] = True
    return ids, there


def loss(model, data, **options):
    found = []
    identify_heads(model, lambda step: data, 1, progress=lambda step, value: found.append(value), **options)
    return found[0]


def streamed(model, ids, sink, recent):
    i, j = torch.arange(20)[:, None], torch.arange(20)
    mask = (j <= i) & ((j < sink) | (i - j <= recent))
    return model.model(ids, attention_mask=mask[None, None].expand(len(ids), -1, -1, -1), use_cache=False).last_hidden_state


def test_loss_of_streaming_heads_is_the_distance_of_hidden_states_where_asked():
    model, data = llama(layers=3, sharp=2), batch()
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.6
    with torch.no_grad():
        truth = model.model(data[0], use_cache=False).last_hidden_state
        for sink, recent in ((2, 4), (0, 3)):
            far = (truth - streamed(model, data[0], sink, recent - 1)).square().mean(-1)[data[1]].mean()
            with torch.enable_grad():
                found = loss(model, data, sink=sink, recent=recent, first=torch.zeros(3, 2))
            assert found == pytest.approx(float(far), rel=1e-5) and far > 0
    assert loss(model, data, penalty=0.3) == pytest.approx(0.3, abs=1e-6)  # all ones are the model itself
    assert loss(model, data, penalty=0.3, sink=50, first=torch.full((3, 2), 0.5)) == pytest.approx(0.15, abs=1e-6)
    assert loss(model, data) == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize("steps", [3, 6, 11])
def test_gates_fall_by_the_schedule_under_a_strong_penalty(steps):
    """The sign of the gradient is known, so that each step of Adam is the rate: it rises over a fifth of the steps and falls over the last."""
    model, data, seen = llama(layers=2), batch(), []
    gates = identify_heads(model, lambda step: data, steps, lr=0.01, penalty=1e6, sink=2, recent=4, progress=lambda *at: seen.append(at[0]))
    warm = max(1, steps // 5)
    rates = [min(1, (at + 1) / warm, (steps - at) / warm) for at in range(steps)]
    assert torch.allclose(gates, torch.full((2, 2), 1 - 0.01 * sum(rates)), atol=1e-4) and seen == list(range(steps))


def test_gates_go_down_the_slope_of_the_distance():
    """Without a penalty the first step of Adam is the rate against the sign of each gate's slope, here by differences."""
    model, data = llama(layers=2, sharp=2), batch()
    start, options = torch.full((2, 2), 0.5), {"penalty": 0.0, "sink": 2, "recent": 4}
    gates = identify_heads(model, lambda step: data, 1, lr=0.01, first=start, **options)
    for at in ((0, 0), (0, 1), (1, 0), (1, 1)):
        ahead, behind = (start.index_put(tuple(map(torch.tensor, at)), torch.tensor(0.5 + step)) for step in (0.05, -0.05))
        slope = loss(model, data, first=ahead, **options) - loss(model, data, first=behind, **options)
        assert float(gates[at]) == pytest.approx(0.49 if slope > 0 else 0.51, abs=1e-4)


def test_gates_stay_between_none_and_all():
    model, data = llama(layers=2), batch()
    for penalty, first, end in ((1e6, 0.1, 0), (-1e6, 0.9, 1)):
        gates = identify_heads(model, lambda step: data, 1, lr=0.5, penalty=penalty, sink=2, recent=4, first=torch.full((2, 2), first))
        assert bool((gates == end).all())


def test_which_heads_stream():
    gates = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.8, 0.75]])
    retrieves = {
        options: DuoAttention(gates, **dict([options])).retrieves.sum().item()
        for options in (("sparsity", 0.0), ("sparsity", 1.0), ("sparsity", 0.5), ("threshold", 0.75), ("threshold", 0.76))
    }
    assert list(retrieves.values()) == [6, 0, 3, 3, 2]
    assert (DuoAttention(gates).sink, DuoAttention(gates).recent, DuoAttention(gates).chunk) == (64, 256, 512)


def test_what_is_refused():
    model, data = llama(layers=2), batch()
    for bad in ({"steps": 0}, {"sink": -1}, {"recent": 0}):
        with pytest.raises(RegardError, match="expected a decoder, and positive numbers"):
            identify_heads(model, lambda step: data, **{"steps": 1, **bad})
    from transformers import GPT2Config, GPT2LMHeadModel

    for other in (torch.nn.Linear(2, 2), GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50))):
        with pytest.raises(RegardError, match="expected a decoder"):
            identify_heads(other, lambda step: data, 1)
    with pytest.raises(RegardError, match="expected the same shape"):
        identify_heads(model, lambda step: (data[0], data[1][:1]), 1)
    assert all(p.requires_grad for p in model.parameters())


def run(policy, steps=8):
    torch.manual_seed(0)
    model, ids = llama(layers=3, sharp=2), torch.randint(1, 50, (2, 30))
    with policy(model) as session, torch.no_grad():
        out = [model(ids).logits[:, -1]]
        for _ in range(steps):
            out.append(model(out[-1].argmax(-1)[:, None], past_key_values=session.cache).logits[:, -1])
        return torch.stack(out[1:], 1), session.cache


@pytest.mark.parametrize("bits", [4, 8])
def test_what_retrieving_heads_keep_may_be_stored_in_few_bits(bits):
    """All heads retrieving: KIVI. Half of them: those alone in codes, the rest as they came; near the numbers' answer at 8 bits."""
    form, gates = Form(bits, bits, 4, 8), torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.8, 0.7]])
    assert torch.equal(run(DuoAttention(gates, 0.0, bits=form))[0], run(KIVI(bits, 4, 8))[0])
    settings = {"sparsity": 0.5, "sink": 2, "recent": 6}
    found, cache = run(DuoAttention(gates, **settings, bits=form))
    truth, plain = run(DuoAttention(gates, **settings))
    assert 0 < (found - truth).abs().max() < (0.05 if bits == 8 else 1.5) * truth.std()
    for layer, other, row in zip(cache.layers, plain.layers, gates >= float(gates.double().quantile(0.5)), strict=True):
        for part in layer.parts:
            kept = bool(row[part.heads].all())
            assert isinstance(part, Packed) == kept and part.keys.shape[2] == (38 if kept else 8)
        assert layer.bytes < other.bytes if bool(row.any()) else layer.bytes == other.bytes
    with pytest.raises(RegardError, match="key_bits=3"):
        DuoAttention(gates, bits=3)
