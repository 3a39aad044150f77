"""The planner: choices, reasons, costs, caching."""

from __future__ import annotations

import torch

import regard
from regard import Causal, Window


def qkv(n=64, m=None, heads=4):
    return torch.randn(1, heads, n, 16), torch.randn(1, heads, m or n, 16), torch.randn(1, heads, m or n, 16)


def test_choices():
    chosen = {
        name: regard.plan(*qkv(), name, mask=Causal()).executor for name in ("softmax", "ssmax", "qknorm", "softpick", "sparsemax", "moba")
    }
    assert chosen == {"softmax": "sdpa", "ssmax": "sdpa", "qknorm": "sdpa", "softpick": "tiled", "sparsemax": "tiled", "moba": "table"}
    assert regard.plan(*qkv(), "softmax", mask=Window(9)).executor == "tiled"
    assert regard.plan(*qkv(), "sinkformer").executor == "dense"
    assert regard.plan(*qkv(), "based").executor == "chunk"


def test_explains():
    text = str(regard.plan(*qkv(), "softpick", mask=Causal()))
    assert "tiled" in text and "not       sdpa: only softmax" in text and "FLOP" in text


def test_density_and_flops_follow_the_mask():
    full, window = (regard.plan(*qkv(2048), "softpick", mask=mask) for mask in (None, Causal() & Window(128)))
    assert full.density == 1.0 and window.density < 0.15
    assert window.flops < 0.15 * full.flops


def test_repeated_calls_reuse_the_plan():
    q, k, v = qkv()
    assert regard.plan(q, k, v, "softmax", mask=Causal()) is regard.plan(q, k, v, "softmax", mask=Causal())
    assert regard.plan(q, k, v, "softmax", mask=Causal()) is not regard.plan(q[:, :, 1:], k, v, "softmax", mask=Causal())


def test_queries_stand_at_the_end_of_the_keys():
    q, k, v = qkv(5, 20)
    whole = regard.attend(torch.cat((torch.randn(1, 4, 15, 16), q), 2), k, v, mask=Causal())
    assert torch.allclose(regard.attend(q, k, v, mask=Causal()), whole[:, :, -5:], atol=1e-6)
    more = regard.attend(k, q, torch.randn(1, 4, 5, 16), mask=Causal())
    assert (more[:, :, :15] == 0).all()


def test_what_a_choice_costs_is_in_the_plan():
    q, k, v = qkv(1024)
    found = {name: regard.plan(q, k, v, name, mask=Causal()) for name in ("moba", "flexprefill", "proxyattn", "spargeattn", "hip", "dhsa")}
    assert found["moba"].choice == 2 * 4 * 1024 * (1024 // 512) * 16
    assert found["flexprefill"].choice == 2 * 4 * (128 * 1024 + 8 * 8) * 16
    assert all(0 < one.choice < one.flops and "choosing it costs" in str(one) for one in found.values())
    assert regard.plan(q, k, v, "softpick").choice is None and "choosing" not in str(regard.plan(q, k, v, "softpick"))
