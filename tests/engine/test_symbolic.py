"""Expressions: derivatives against autograd, programs against the functions they came from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard.engine.symbolic import Program, pullback, trace, var

FUNCTIONS = [
    torch.exp,
    torch.sigmoid,
    torch.tanh,
    torch.relu,
    F.softplus,
    F.gelu,
    F.silu,
    F.elu,
    F.relu6,
    torch.abs,
    torch.sin,
    torch.cos,
    torch.erf,
    lambda s: s**2,
    lambda s: s**3,
    lambda s: 1 / (1 + s * s),
    lambda s: torch.log1p(s.abs()),
    lambda s: torch.sqrt(s * s + 1),
    lambda s: s.clamp(-0.5, 0.5),
    lambda s: torch.where(s > 0, s.exp(), 1 + s),
    lambda s: torch.maximum(s, 0.3 * s),
    lambda s: (s - 1).sign() * s,
    lambda s: torch.expm1(s) / 2,
    lambda s: (s * s + 0.1) ** 1.7,
    lambda s: torch.log(s * s + 1),
    lambda s: 2 - s,
    lambda s: F.gelu(s, approximate="tanh"),
    lambda s: torch.exp2(s),
    lambda s: torch.minimum(s, s * s),
    lambda s: F.logsigmoid(s),
    lambda s: s.square() * s.neg() + s.reciprocal() * 0,
]


@pytest.mark.parametrize("at", range(len(FUNCTIONS)))
def test_value_and_derivative(at):
    function = FUNCTIONS[at]
    s = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, 7, dtype=torch.float64)
    e = trace(function, [var("s")], {})
    (slope,) = pullback([e], [var("g")], [var("s")])
    truth = function(s)
    (grad,) = torch.autograd.grad(truth, s, g)
    value, ds = Program([e, slope], ["s", "g"])({"s": s.detach().clone(), "g": g.clone()})
    assert torch.allclose(value, truth, atol=1e-12)
    assert torch.allclose(torch.as_tensor(ds, dtype=torch.float64).expand(4, 7), grad, atol=1e-12)


def test_programs_overwrite_only_what_they_own():
    e = trace(lambda s, c: torch.exp(s - c) * s, [var("s")], {"c": var("c")})
    s, c = torch.randn(3, 5), torch.randn(3, 1)
    kept = s.clone()
    Program([e], [])({"s": s, "c": c})
    assert torch.equal(s, kept)
    out = Program([e], ["s"])({"s": s, "c": c})[0]
    assert torch.allclose(out, torch.exp(kept - c) * kept)
