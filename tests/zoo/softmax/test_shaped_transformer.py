"""Shaped attention's limit: drift and diffusion of the covariance in loops over tokens, its simulation, random layers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import regard
from regard.zoo.softmax import shaped_transformer as shaped


def covariance() -> Tensor:
    x = torch.randn(3, 9, dtype=torch.float64)
    return x @ x.T / 9


def s1(v: Tensor, a: int, d: int, b: int, w: int) -> float:
    m = len(v)
    mean = [float(v[i].sum()) / m for i in range(m)]
    return float(v[a, b]) * (float(v[d, w]) - mean[d] - mean[w] + float(v.sum()) / m**2)


def s2(v: Tensor, a: int, d: int) -> float:
    m = len(v)
    spread = float(v[d, d]) - 2 * float(v[d].sum()) / m + 2 * float(v.sum()) / m**2 - sum(float(v[i, i]) for i in range(m)) / m
    return float(v[a, a]) * spread


@pytest.mark.parametrize(("gamma", "tau0"), [(0.5, 1.0), (0.3, 1.7)])
def test_drift(gamma: float, tau0: float) -> None:
    v, m = covariance(), 3
    want, bent = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    for a, b in itertools.product(range(m), repeat=2):
        first = sum(float(v[p, q]) * s1(v, a, p, b, q) for p in range(m) for q in range(m)) / m**2
        second = sum(float(v[b, p]) * s2(v, a, p) + float(v[a, p]) * s2(v, b, p) for p in range(m)) / (2 * m)
        want[a, b] = gamma**2 / tau0**2 * (first + second)
        size = math.sqrt(float(v[a, a] * v[b, b]))
        rho = min(1.0, float(v[a, b]) / size)
        bent[a, b] = (0.8 + 0.5) ** 2 / (2 * math.pi) * (math.sqrt(1 - rho * rho) - rho * math.acos(rho)) * size
    given = {} if gamma == 0.5 else {"gamma": gamma, "tau0": tau0}
    torch.testing.assert_close(shaped.drift(v, **given), want)
    torch.testing.assert_close(shaped.drift(v, relu=(0.8, -0.5), **given), want + bent, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(("gamma", "tau0"), [(0.5, 1.0), (0.3, 1.7)])
def test_diffusion(gamma: float, tau0: float) -> None:
    v, m = covariance(), 3
    want, linear = torch.zeros(3, 3, 3, 3, dtype=torch.float64), torch.zeros(3, 3, 3, 3, dtype=torch.float64)
    for a, b, d, w in itertools.product(range(m), repeat=4):
        linear[a, b, d, w] = v[a, d] * v[b, w] + v[a, w] * v[b, d]
        mixed = sum(
            float(v[a, p] * v[d, q]) * s1(v, b, p, w, q)
            + float(v[a, p] * v[w, q]) * s1(v, b, p, d, q)
            + float(v[b, p] * v[d, q]) * s1(v, a, p, w, q)
            + float(v[b, p] * v[w, q]) * s1(v, a, p, d, q)
            for p in range(m)
            for q in range(m)
        )
        want[a, b, d, w] = gamma**2 * (2 - gamma**2) * linear[a, b, d, w] + gamma**4 / tau0**2 * mixed / m**2
    given = {} if gamma == 0.5 else {"gamma": gamma, "tau0": tau0}
    torch.testing.assert_close(shaped.diffusion(v, **given), want)
    torch.testing.assert_close(shaped.diffusion(v, mlp=True, **given), want + linear)


def test_one_step_of_the_simulation_is_drift_plus_noise_of_that_covariance() -> None:
    v, dt = covariance(), 0.01
    draws = torch.stack([shaped.simulate(v, dt, steps=1, gamma=0.4, tau0=1.3, seed=seed)[1] for seed in range(1500)])
    moved = (draws - v).flatten(1)
    sigma = shaped.diffusion(v, 0.4, 1.3).reshape(9, 9)
    error = moved.std(0) / 1500**0.5
    assert bool(((moved.mean(0) - shaped.drift(v, 0.4, 1.3).flatten() * dt).abs() < 5 * error).all())
    found = moved.T.cov() / dt
    assert float((found - sigma).norm() / sigma.norm()) < 0.15


def test_paths() -> None:
    v = covariance()
    path = shaped.simulate(v, 0.5, steps=20)
    assert path.shape == (21, 3, 3) and torch.equal(path[0], v) and torch.equal(path[1:], path[1:].mT)
    assert torch.equal(path, shaped.simulate(v, 0.5, 20, 0.5, 1.0, 0)) and not torch.equal(path, shaped.simulate(v, 0.5, 20, seed=1))
    assert len(shaped.simulate(v, 0.5)) == 201


@pytest.mark.parametrize("kind", ["shaped", "softmax"])
def test_a_random_layer(kind: str) -> None:
    x, layer = torch.randn(2, 4, 16, dtype=torch.float64), shaped.Layer(gamma=0.6, tau0=1.5, kind=kind, key_dim=8)
    out = layer(x, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 2, 16, 8, generator=generator, dtype=torch.float64)
    values = torch.randn(2, 16, 16, generator=generator, dtype=torch.float64)
    for b in range(2):
        y = x[b] @ keys[0, b] @ (x[b] @ keys[1, b]).T / 16 / math.sqrt(8)
        a = torch.eye(4) + (y / (1.5 * 4)).softmax(-1) - 0.25 if kind == "shaped" else y.softmax(-1)
        torch.testing.assert_close(out[b], 0.8 * x[b] + 0.6 * a @ x[b] @ values[b] / 4)
    assert (shaped.Layer().gamma, shaped.Layer().tau0, shaped.Layer().kind, shaped.Layer().key_dim) == (0.5, 1.0, "shaped", 32)


def test_default_width_and_refusals() -> None:
    q, k, v = (torch.randn(1, 1, 5, 4, dtype=torch.float64) for _ in range(3))
    s = q @ k.mT / 2 / math.sqrt(128)
    torch.testing.assert_close(regard.attend(q, k, v, "shaped-transformer"), v + (s.softmax(-1) - 0.2) @ v)
    for wrong in ({"width": 0}, {"tau0": 0.0}):
        with pytest.raises(regard.RegardError, match="positive numbers"):
            regard.get("shaped-transformer", **wrong)


def test_measures() -> None:
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(shaped.covariance(x), x @ x.mT / 5)
    few = shaped.token_cosine("shaped", depth=2, width=16, tokens=3, seeds=2)
    assert 0 < few < 1 and few == shaped.token_cosine("shaped", 2, 16, 3, 2, 0.5) != shaped.token_cosine("shaped", 2, 16, 3, 2, 0.9)
    same = shaped.token_cosine("softmax", depth=40, width=16, tokens=3, seeds=1)
    assert 0.9 < same <= 1.0


@pytest.mark.parametrize("kind", ["shaped", "softmax"])
@torch.no_grad()
def test_cosines_between_tokens_after_random_layers(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, total = torch.randn(2, 3, 16, generator=generator, dtype=torch.float64), 0.0
    for _ in range(2):
        x = shaped.Layer(0.7, kind=kind)(x, generator)
        x = torch.stack([one / one.square().mean().sqrt() for one in x])
    for one in x:
        for a, b in itertools.permutations(one, 2):
            total += abs(float(a @ b / (a.norm() * b.norm()))) / 12
    assert shaped.token_cosine(kind, depth=2, width=16, tokens=3, seeds=2, gamma=0.7) == pytest.approx(total)


def test_measured_drift_averages_over_pairs_of_draws() -> None:
    """E over W_V in closed form, W_Q and -W_Q; rounds of 500 pairs, the part of a round that is left out, but one at least."""
    x, layer = torch.randn(3, 8, dtype=torch.float64), shaped.Layer(0.6, 1.5, key_dim=4)
    v = x @ x.T / 8
    for draws, rounds in ((1200, 1), (2000, 2), (100, 1)):
        generator, total = torch.Generator().manual_seed(2), torch.zeros(3, 3, dtype=torch.float64)
        for _ in range(rounds):
            queries, keys = torch.randn(2, 500, 8, 4, generator=generator, dtype=torch.float64)
            for sign in (1, -1):
                y = (sign * x @ queries) @ (x @ keys).mT / 8 / math.sqrt(4)
                a = torch.eye(3) + (y / (1.5 * math.sqrt(8))).softmax(-1) - 1 / 3
                total += (a @ v @ a.mT).sum(0) / (1000 * rounds)
        torch.testing.assert_close(shaped.measured_drift(x, layer, draws, seed=2), 8 * 0.36 * (total - v))


def test_blocks_take_heads_temperatures_and_direction() -> None:
    block, x = shaped.ShapedBlock(8, 2, tau0=2.0, causal=True).double(), torch.randn(1, 5, 8, dtype=torch.float64)
    assert block.gamma == 0.5 and block.up.out_features == 8 and block.slopes == pytest.approx((1.0, 1 - 1 / math.sqrt(8)))
    q, k, v = (w(x).unflatten(-1, (2, 4)).transpose(1, 2) for w in (block.attention.q, block.attention.k, block.attention.v))
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    s = (q @ k.mT / 2 / (2 * math.sqrt(8))).masked_fill(~seen, -math.inf)
    a = torch.eye(5) + s.softmax(-1) - seen / seen.sum(-1, keepdim=True)
    keep = math.sqrt(0.75)
    y = keep * x + 0.5 * (a @ v).transpose(1, 2).flatten(-2)
    h = block.up(y)
    torch.testing.assert_close(block(x), keep * y + 0.5 * block.down(torch.where(h > 0, h, h * (1 - 1 / math.sqrt(8)))))
    for gamma in (0.0, 1.0):
        with pytest.raises(regard.RegardError, match="between 0 and 1"):
            shaped.ShapedBlock(8, gamma=gamma)
    before = [p.clone() for p in block.parameters()]
    block.reset_parameters()
    assert not any(torch.equal(a, b) for a, b in zip(before, block.parameters(), strict=True))
