"""LeanAttention: half precision, other value sizes, empty sequences, bad input."""

import pytest
import torch
import torch.nn.functional as F

from regard import RegardError
from regard.zoo.systems import leanattention
from regard.zoo.systems.leanattention import lean_decode, schedule


def test_half_precision_and_values_of_another_size():
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 24)
    truth = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert torch.allclose(lean_decode(q, k, v)[0], truth, atol=1e-5)
    half = lean_decode(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half[0].dtype == torch.bfloat16 and half[1].dtype == torch.float32 and (half[0].float() - truth).abs().max() < 0.02
    scaled = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.5)
    assert torch.allclose(lean_decode(q, k, v, scale=0.5, tile=7)[0], scaled, atol=1e-5)


def test_sequences_without_keys_and_batches_without_sequences():
    q, k = torch.randn(2, 2, 1, 8), torch.randn(2, 1, 5, 8)
    out, lse = lean_decode(q, k, k, torch.tensor([0, 3]))
    assert (out[0] == 0).all() and lse[0].isneginf().all() and out[1].isfinite().all()
    assert lean_decode(q[:0], k[:0], k[:0])[0].shape == (0, 2, 1, 8)
    assert schedule([0, 0], 2).spans == []


def test_bad_input():
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8)
    for bad in ((q, k[:1], k[:1]), (q[:, :3], k, k), (q[0], k, k), (q, k[..., :4], k), (q, k, k[:, :, :3])):
        with pytest.raises(RegardError, match="expected"):
            lean_decode(*bad)
    for options in ({"lengths": [6, 1]}, {"lengths": [1]}, {"lengths": [-1, 2]}, {"tile": 0}, {"workers": 0}):
        with pytest.raises(RegardError, match="expected"):
            lean_decode(q, k, k, **options)


def test_a_worker_holds_few_scores_at_a_time(monkeypatch):
    """Its tiles in pieces of one, two and three, or all at once: the same."""
    q, k = torch.randn(2, 4, 3, 8, dtype=torch.float64), torch.randn(2, 2, 90, 8, dtype=torch.float64)
    truth = lean_decode(q, k, k, [90, 41], tile=8, workers=3)
    most, seen = [], torch.Tensor.amax
    monkeypatch.setattr(torch.Tensor, "amax", lambda x, *a, **o: most.append(x.numel()) or seen(x, *a, **o))
    for pieces in (1, 2, 3):
        most.clear()
        monkeypatch.setattr(leanattention, "SCORES", pieces * 2 * 3 * 8 + 5)
        found = lean_decode(q, k, k, [90, 41], tile=8, workers=3)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, truth, strict=True))
        assert max(most) == pieces * 2 * 3 * 8
    monkeypatch.setattr(leanattention, "SCORES", 1)
    assert torch.allclose(lean_decode(q, k, k, [90, 41], tile=8, workers=3)[0], truth[0], atol=1e-12)


def test_the_schedule_is_the_papers_unless_it_is_told_otherwise(monkeypatch):
    q, k, seen = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 600, 8), []
    monkeypatch.setattr(leanattention, "schedule", lambda *given: seen.append(given) or schedule(*given))
    lean_decode(q, k, k, [600, 300])
    lean_decode(q, k, k, tile=128, workers=5)
    assert seen == [([600, 300], 2, 256, 16), ([600, 600], 2, 128, 5)]
    assert schedule([600], 2) == schedule([600], 2, 256, 16)
