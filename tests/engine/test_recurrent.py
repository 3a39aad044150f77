"""The recurrence's executions against the token loop, at awkward lengths and decays."""

from __future__ import annotations

import itertools

import pytest
import torch

import regard
from regard import Causal, Recurrent
from regard.engine import recurrent as scans
from regard.lab import naive

SHAPES = {"head": (3,), "token": (2, 3), "channel": (2, 3)}


def problem(length, decay, write, strength):
    q, k, v = (torch.randn(2, 3, length, d, dtype=torch.float64) for d in (8, 8, 5))
    inputs = {}
    if decay != "none":
        shape = {"head": (3,), "token": (2, 3, length), "channel": (2, 3, length, 8)}[decay]
        inputs["log_decay"] = -strength * torch.rand(shape, dtype=torch.float64)
    if write == "delta":
        inputs["beta"] = torch.rand(2, 3, length, dtype=torch.float64)
        k = torch.nn.functional.normalize(k, dim=-1)
    return q, k, v, inputs


def spread(inputs, length):
    g = inputs.get("log_decay")
    if g is None:
        return None
    return {1: lambda: g[None, :, None, None].expand(2, 3, length, 1), 3: lambda: g[..., None], 4: lambda: g}[g.dim()]()


@pytest.mark.parametrize("write", ["add", "delta"])
@pytest.mark.parametrize("decay", ["none", "head", "token", "channel"])
@pytest.mark.parametrize("strength", [1e-6, 1.0, 8.0, 150.0])
def test_forms_equal_the_loop(decay, write, strength):
    mechanism = Recurrent(decay=decay, write=write)
    for length in (1, 63, 64, 65, 130):
        q, k, v, inputs = problem(length, decay, write, strength)
        truth, last = naive.recurrence(q * 8**-0.5, k, v, spread(inputs, length), inputs.get("beta"))
        scan = scans.pose(mechanism, Causal(), q, k, v, None, inputs)
        for mode in ("parallel", "chunk", "step"):
            out, state = scans.run(scan, mode)
            assert naive.gap(out, truth) < 1e-10, (mode, length)
            assert state is None or naive.gap(state, last) < 1e-10
        split = length // 3
        if split:
            first, state = scans.run(scans.pose(mechanism, Causal(), *[x[:, :, :split] for x in (q, k, v)], None, part(inputs, 0, split)))
            rest, state = scans.run(
                scans.pose(mechanism, Causal(), *[x[:, :, split:] for x in (q, k, v)], None, part(inputs, split, length)), "chunk", state
            )
            assert naive.gap(torch.cat((first, rest), 2), truth) < 1e-10 and naive.gap(state, last) < 1e-10


def part(inputs, start, stop):
    return {name: x if x.dim() == 1 else x[:, :, start:stop] for name, x in inputs.items()}


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("strength", [1.0, 30.0])
def test_gradients_equal_the_loop(decay, strength):
    q, k, v, inputs = problem(65, decay, "add", strength)
    leaves = [x.requires_grad_() for x in (q, k, v, *inputs.values())]
    out = scans.run(scans.pose(Recurrent(decay=decay), Causal(), q, k, v, None, inputs))[0]
    loop = naive.recurrence(q * 8**-0.5, k, v, spread(inputs, 65))[0]
    grads = [torch.autograd.grad(x.square().sum(), leaves) for x in (out, loop)]
    assert max(naive.gap(a, b) for a, b in zip(*grads, strict=True)) < 1e-8


def test_long_streams_stay_finite_in_float32():
    q, k, v = (torch.randn(1, 1, 20_000, 8) for _ in range(3))
    for g in (0.0, -1e-5, -50.0):
        out = regard.attend(q, k, v, "gla", log_decay=torch.full((1, 1, 20_000, 8), g))
        assert torch.isfinite(out).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gla", "deltanet", "efla", "gsa", "lightnet", "regla", "log-linear-attention"])
def test_64k_tokens_at_decays_of_nothing_and_everything(name):
    """Logs of decays at -1e-6 and at -60: finite, forward and backward, and the last token as a stream of pieces has it."""
    n = 65_536
    mechanism = regard.get(name, **({"slots": 4} if name == "gsa" else {}))
    for g in (-1e-6, -60.0):
        q, k, v = (torch.randn(1, 1, n, 4) for _ in range(3))
        known = {
            "log_decay": torch.full((1, 1, n) if name == "log-linear-attention" else (1, 1, n, 4), g),
            "beta": torch.rand(1, 1, n),
            "log_forget": torch.full((1, 1, n, 4), g),
            "level_scales": torch.ones(1, 1, n, 17),
        }
        k = torch.nn.functional.normalize(k, dim=-1) if "beta" in names_of(mechanism) else k
        inputs = {name: known[name] for name in names_of(mechanism) if name in known}
        q.requires_grad_()
        out = regard.attend(q, k, v, mechanism, mask=Causal(), **inputs)
        (grad,) = torch.autograd.grad(out.sum(), q)
        assert out.isfinite().all() and grad.isfinite().all()
        with torch.no_grad():
            state = None
            cuts = (0, n - 1, n) if name == "log-linear-attention" else (0, 40_000, n - 1, n)  # its later pieces go token by token
            for a, b in itertools.pairwise(cuts):
                now = {name: x[:, :, a:b] for name, x in inputs.items()}
                last, state = regard.step(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], mechanism, state, **now)
        assert float((last[:, :, -1] - out[:, :, -1]).abs().max()) < 1e-3 * float(1 + out[:, :, -1].abs().max())


def names_of(mechanism):
    return {item.name for item in regard.engine.composed.inputs_of(mechanism)}


def test_bidirectional_linear_attention_is_the_full_product():
    q, k, v = (torch.randn(1, 2, 30, 8, dtype=torch.float64) for _ in range(3))
    a = q.relu() @ k.relu().transpose(-1, -2)
    out = regard.attend(q, k, v, regard.get("cosformer", horizon=1e12))
    assert torch.allclose(out, (a @ v) / a.sum(-1, keepdim=True).clamp_min(1e-6), atol=1e-9)
