"""Gradients of gradients: right by every executor, or one clear error."""

from __future__ import annotations

import pytest
import torch
from samples import NAMES, described, sample

import regard
from regard import Causal, RegardError
from regard.algebra import Recurrent, Weighted


def penalty(call, **options):
    """Gradients of |d loss / d (q, k, v)|^2."""
    leaves = [x.requires_grad_() for x in (call.q, call.k, call.v)]
    first = torch.autograd.grad(call.run(**options).square().sum(), leaves, create_graph=True)
    return [x.detach() for x in first], torch.autograd.grad(sum(x.square().sum() for x in first), leaves)


@pytest.mark.parametrize("name", NAMES)
def test_by_default(name):
    call = sample(name, q_len=11)
    options = {"mask": Causal() if call.causal else None}
    try:
        first, second = penalty(call, **options)
    except RegardError as error:
        assert "second derivatives" in str(error)
        return
    leaves = [call.q, call.k, call.v]
    plain = torch.autograd.grad(call.run(**options).square().sum(), leaves)
    _, truth = penalty(call, executor="reference", **options)
    for a, b in zip((*first, *second), (*plain, *truth), strict=True):
        assert torch.isfinite(a).all() and torch.allclose(a, b, rtol=1e-6, atol=1e-8 * max(1.0, float(b.abs().max())))


# Their gradient holds a factor of each row fixed (the layer's norm takes it out; the paper's statistics are constants): it is not
# the slope of the value, so differences of it say nothing about it.
FIXED_FACTORS = ("lln-attention", "performer", "regla")


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(described(n), (Weighted, Recurrent)) and n not in FIXED_FACTORS])
def test_against_differences(name):
    """The slope of a projection of the gradient along a direction, by central differences."""
    call = sample(name, q_len=7, batch=1, heads=2, kv_heads=2)
    mask = Causal() if call.causal else None
    generator = torch.Generator().manual_seed(3)
    leaves = [call.q, call.k, call.v]
    seeds, direction = ([torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in leaves] for _ in range(2))
    executor = "tiled" if described(name) == regard.get("softmax") else None

    def projected(at, create=False):
        tensors = [x.detach().clone().requires_grad_() for x in at]
        out = regard.attend(*tensors, call.mechanism, mask=mask, executor=executor, **call.inputs)
        grads = torch.autograd.grad(out.square().sum(), tensors, create_graph=create)
        return sum((g * s).sum() for g, s in zip(grads, seeds, strict=True)), tensors

    try:
        value, tensors = projected(leaves, create=True)
    except RegardError as error:
        assert "second derivatives" in str(error)
        return
    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(value, tensors), direction, strict=True))
    step = 1e-6
    ahead, behind = (projected([x + sign * step * d for x, d in zip(leaves, direction, strict=True)])[0] for sign in (1, -1))
    difference = (ahead - behind) / (2 * step)
    assert abs(float(slope - difference)) <= 1e-3 * max(1.0, abs(float(difference)))


@pytest.mark.parametrize("executor", ["native", "tiled", "reference"])
@pytest.mark.parametrize("name", ["softmax", "softpick", "sigmoid", "entmax", "ssmax"])
def test_executors_agree_in_float32(name, executor):
    call = sample(name, dtype=torch.float32, q_len=40)
    options = {"mask": Causal() & regard.Window(9)}
    for a, b in zip(
        penalty(call, executor=executor, **options)[1], penalty(call.to(torch.float64), executor="reference", **options)[1], strict=True
    ):
        assert torch.allclose(a.double(), b, rtol=2e-2, atol=2e-3 * float(b.abs().max()))


@pytest.mark.parametrize("name", [*NAMES])
def test_forward_mode(name):
    """Tangents are the backward pass's: their product with any cotangent is the same number; where there are none, an error says so."""
    call = sample(name, q_len=9, batch=1, heads=2, kv_heads=2)
    options = {"mask": Causal() if call.causal else None}
    q, (tangent, cotangent) = call.q, (torch.randn(2, *call.q.shape, dtype=torch.float64))
    cotangent = cotangent[..., :6]
    with torch.autograd.forward_ad.dual_level():
        call.q = torch.autograd.forward_ad.make_dual(q, tangent)
        try:
            pushed = torch.autograd.forward_ad.unpack_dual(call.run(**options)).tangent
        except NotImplementedError as error:
            assert "jvp" in str(error) or "forward AD" in str(error)
            return
    call.q = q.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(call.run(**options), call.q, cotangent)
    assert pushed is not None
    assert abs(float((pushed * cotangent).sum() - (pulled * tangent).sum())) <= 1e-6 * max(1.0, float((pulled * tangent).abs().sum()))


def test_fused_softmax_says_what_to_do():
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    with pytest.raises(RegardError, match="executor='tiled'"):
        torch.autograd.grad(regard.attend(q, k, v).sum(), q, create_graph=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = regard.attend(q, k, v)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), q)
    (one,) = torch.autograd.grad(regard.attend(q, k, v, executor="tiled").square().sum(), q, create_graph=True)
    (other,) = torch.autograd.grad(one.square().sum(), q)
    assert torch.allclose(second, other, rtol=1e-3, atol=1e-4)
