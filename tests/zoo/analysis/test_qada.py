"""QAdA beyond its checks: beams, half precision, pieces, windows of the model's own, and what is refused."""

from __future__ import annotations

import pytest
import torch

from regard import RegardError, models, taps
from regard.cache.moments import Moments
from regard.lab.checks.shared.decoding import llama
from regard.zoo.analysis.qada import QAdA, attend_adaptively, calibrate, sparsity_curve

transformers = pytest.importorskip("transformers")


def test_beams_take_their_moments_along():
    model, ids = llama(layers=2, sharp=2), torch.arange(1, 31)[None]
    options = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    plain = model.generate(ids, **options)
    with QAdA(2, 6, 1.1)(model) as session:
        assert torch.equal(model.generate(ids, **options), plain)
    layer = session.cache.layers[1]
    gone = layer.parts[0].keys[:, :, 2 : int(layer.memory["upto"][0]) + 1].double()
    assert gone.shape[2] > 20 and torch.allclose(layer.memory["outer"], gone.mT @ gone)


def test_pieces_of_a_text_are_decided_as_its_prompt():
    model, ids = llama(layers=2, sharp=2), torch.randint(1, 40, (2, 40))
    with torch.no_grad(), QAdA(2, 6, 0.7, prompt=True)(model):
        whole = model(ids).logits
    with torch.no_grad(), QAdA(2, 6, 0.7, prompt=True)(model):
        cache, parts = None, []
        for piece in ids.split((9, 1, 1, 20, 9), 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache, _ = out.past_key_values, parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


def test_half_precision_and_huge_scores():
    q, k, v = (30 * torch.randn(1, 2, 50, 8).half() for _ in range(3))
    out, local = attend_adaptively(q, k, v, QAdA(2, 5))
    assert out.isfinite().all() and out.dtype == torch.float16 and local.shape == (1, 2, 50)
    assert bool(attend_adaptively(q, k, v, QAdA(0, 60))[1].all())  # no key is far


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_the_ends_of_tau(tau):
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    _, local = attend_adaptively(q, k, v, QAdA(2, 5, tau))
    assert local[..., :7].all() and bool(local[..., 7:].all()) == (tau == 0) and bool(local[..., 7:].any()) == (tau == 0)


def test_rules_by_head_and_reports():
    table = torch.tensor([[True, False]])
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    policy = QAdA(2, 5, rule=table, report=True)
    _, local = attend_adaptively(q, k, v, policy)
    assert local[0].float().mean(1).tolist() == [1.0, 0.0] and policy.shares().scores.tolist() == [[1.0, 0.0]]
    oracle = QAdA(2, 5, rule="oracle", report=True)
    _, truth = attend_adaptively(q, k, v, oracle)
    found = policy.found()
    assert oracle.found()["agreement"] == 1 and found["sparsity"] == 0.5
    assert found["false_local"] == pytest.approx(float((~truth[0, 0]).sum()) / 40)
    assert found["false_full"] == pytest.approx(float(truth[0, 1].sum()) / 40)


def test_padding_is_not_counted_and_windows_of_the_model_are_left():
    model, ids = llama(layers=2), torch.randint(1, 40, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    policy = QAdA(2, 4, prompt=True)
    with torch.no_grad(), policy(model):
        model(ids, attention_mask=mask)
    assert policy.tally[0].total.tolist() == [19] * len(policy.tally[0].total)
    config = transformers.MistralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=4,
    )
    windowed = transformers.MistralForCausalLM(config).eval()
    policy = QAdA(1, 2, 0.0, prompt=True)
    with torch.no_grad():
        truth = windowed(ids).logits
        with policy(windowed):
            assert torch.allclose(windowed(ids).logits, truth, atol=1e-5)
    with pytest.raises(RegardError, match="no query"):
        policy.found()


def test_what_does_not_fit_is_refused():
    model = llama(layers=2)
    for options in ({"sink": -1}, {"local": 0}, {"tau": -0.1}, {"tau": float("nan")}, {"rule": "static"}, {"rule": torch.ones(2, 4)}):
        with pytest.raises(RegardError, match="expected sink"):
            QAdA(**options)
    with pytest.raises(RegardError, match="moments has 1"):
        QAdA(moments=[Moments.of(torch.ones(2, 3, 4), torch.ones(2, 3).bool())])(model)
    with pytest.raises(RegardError, match="rule is a table"):
        QAdA(rule=torch.ones(3, 4).bool())(model)
    q = torch.randn(1, 3, 2, 4)
    with pytest.raises(RegardError, match="expected"):
        attend_adaptively(q, q[:, :2], q[:, :2], QAdA())
    with pytest.raises(RegardError, match="more than"):
        calibrate(models.load("tiny"), torch.ones(1, 30, dtype=torch.long))
    assert [len(p) for p in sparsity_curve(models.load("tiny"), [(torch.arange(1, 30), torch.tensor([65, 66]))] * 2, [0.5], local=8)] == [3]


def test_scale_of_scores():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 5)
    for options in ({}, {"scale": 0.9}):
        scale = options.get("scale", 8**-0.5)
        out, local = attend_adaptively(q, k, v, QAdA(sink=2, local=6, rule="oracle", tau=0.5), **options)
        for h in range(4):
            for n in range(3):
                place = 37 + n
                p = (scale * k[0, h // 2, : place + 1] @ q[0, h, n]).softmax(0)
                near = [j for j in range(place + 1) if j < 2 or j > place - 6]
                is_local = float(p[near].sum()) >= 0.5
                kept = near if is_local else list(range(place + 1))
                truth = (p[kept] / p[kept].sum()) @ v[0, h // 2, kept]
                assert bool(local[0, h, n]) == is_local and torch.allclose(out[0, h, n], truth, atol=1e-5)


def test_moments_of_a_text_leave_out_its_ends():
    model, ids = llama(), torch.randint(1, 50, (2, 30))
    with taps.read(model, "k") as seen:
        model(ids)
    found = calibrate(model, ids, 3, 7)
    for layer, own in enumerate(found):
        keys = seen["k", layer][:, :, 3:23].transpose(0, 1).flatten(1, 2)
        assert own.count.flatten().tolist() == [40.0] * 2 and torch.allclose(own.total.flatten(), keys.sum(1).flatten().to(own.total))
        assert torch.allclose(own.outer.flatten(), torch.einsum("hnd,hne->hde", keys, keys).flatten().to(own.outer))
    with pytest.raises(RegardError, match="more than sink"):
        calibrate(model, ids)
