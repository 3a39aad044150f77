"""Hard inputs for every weighted mechanism: values and gradients stay finite and equal to the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from samples import NAMES, Call, described, sample

import regard
from regard import Causal
from regard.algebra import Input, Modified, Weighted
from regard.algebra.mechanism import Hybrid

WEIGHTED = [n for n in NAMES if isinstance(described(n), (Weighted, Hybrid))]
# Equal logits are where nap divides rounding errors by its own eps, 1e-3: float32 itself has no more digits there.
LOOSER = {"nap": 1e-2}
# Phases of 1e4 turns, and potentials that add up numbers of 1e4, leave no digits behind the point: these are held to be finite.
WITHOUT_DIGITS = ("tapa", "sinkformer")
DTYPES = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


# Rows of equal scores stand on an edge of these functions (a row's extremes): which of the tied scores gets the slope is rounding.
EDGES = ("sa-softmax",)


def checked(call: Call, tolerance: float, slopes: bool = True, **options: object) -> None:
    """Values and gradients of q, k, v against the reference on the same rounded numbers, relative to the largest entry; where a function
    has no slope, gradients need only be numbers."""
    leaves = [x.requires_grad_() for x in (call.q, call.k, call.v)]
    exact = call.to(torch.float64)
    wide = [x.detach().requires_grad_() for x in (exact.q, exact.k, exact.v)]
    exact.q, exact.k, exact.v = wide
    out, truth = call.run(**options), exact.run(executor="reference", **options)
    seed = torch.randn(truth.shape, dtype=torch.float64)
    grads = torch.autograd.grad((out.double() * seed).sum(), leaves)
    expected = torch.autograd.grad((truth * seed).sum(), wide)
    for a, b in zip((out, *grads), (truth, *expected), strict=True):
        assert torch.isfinite(a).all()
        if a is not out and not slopes:
            continue
        if b.abs().max() < 6e4:  # beyond it half precision itself ends
            assert float((a.double() - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def mask_of(name: str) -> object:
    mechanism = described(name)
    return Causal() if mechanism.can_be_causal or mechanism.causal_only else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WEIGHTED)
def test_equal_rows(name, dtype):
    call = sample(name, dtype=dtype, q_len=17)
    call.k = call.k[:, :, :1].expand_as(call.k).clone()
    checked(call, max(DTYPES[dtype], LOOSER.get(name, 0.0)), name not in EDGES, mask=mask_of(name))


@pytest.mark.parametrize("name", WEIGHTED)
def test_scores_of_ten_thousand(name):
    call = sample(name, dtype=torch.float32, q_len=17)
    call.q = call.q * 4e3
    assert call.run(mask=mask_of(name)).isfinite().all()
    if name in WITHOUT_DIGITS:
        call.q = call.q / 100  # where float32 has some
    checked(call, 2e-2, mask=mask_of(name))


@pytest.mark.parametrize("name", WEIGHTED)
def test_denormals(name):
    call = sample(name, dtype=torch.float32, q_len=17)
    call.q = call.q * 1e-41
    checked(call, 1e-4, mask=mask_of(name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WEIGHTED)
def test_nan_in_padding_does_not_leak(name, dtype):
    if name in ("sinkformer", "neighborhood", "moba"):
        pytest.skip("rows depend on the number of queries, or on the grid's or blocks' size")
    call, other = sample(name, dtype=dtype), sample(name, dtype=dtype)
    keep = torch.ones(2, 29, dtype=torch.bool)
    keep[:, 20:] = False
    for x in (other.k, other.v):
        x[:, :, 20:] = float("nan")
    leaves = [x.requires_grad_() for x in (other.q, other.k, other.v)]
    out = other.run(mask=regard.Padding(), keep=keep)
    assert torch.equal(out, call.run(mask=regard.Padding(), keep=keep))
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.isfinite(g).all() for g in grads) and (grads[1][:, :, 20:] == 0).all() and (grads[2][:, :, 20:] == 0).all()


@pytest.mark.parametrize("name", WEIGHTED)
def test_nan_under_an_explicit_mask_does_not_leak(name):
    call, other = sample(name, dtype=torch.float32), sample(name, dtype=torch.float32)
    seen = torch.rand(29, 29, generator=torch.Generator().manual_seed(1)) < 0.7
    seen = torch.ones_like(seen) if name == "sinkformer" else seen  # its rows depend on one another: all see the same keys
    seen[:, [4, 28]] = False
    for x in (other.k, other.v):
        x[:, :, [4, 28]] = float("nan")
    leaves = [x.requires_grad_() for x in (other.q, other.k, other.v)]
    out = other.run(mask=seen)
    assert torch.equal(out, call.run(mask=seen))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("name", WEIGHTED)
def test_one_key(name):
    call = sample(name, dtype=torch.float32, q_len=9, k_len=1)
    checked(call, 1e-4)


def biased(s, added):
    return s + added


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "relu", "sparsemax", "entmax", "sa-softmax", "clipped-softmax", "ssmax"])
def test_biases_of_minus_infinity(name):
    """A score of -inf weighs nothing, in values and gradients, wherever weights fall to 0 there."""
    call = sample(name, dtype=torch.float32)
    bias = torch.where(torch.rand(29, 29, generator=torch.Generator().manual_seed(2)) < 0.3, float("-inf"), 0.0)
    bias.fill_diagonal_(0.0)
    moved = replace(call.mechanism, position=Modified(biased, (Input("added", "bhqk"),)))
    leaves = [x.requires_grad_() for x in (call.q, call.k, call.v)]
    masked = call.run(mask=bias == 0)
    out = regard.attend(call.q, call.k, call.v, moved, **call.inputs, added=bias[None, None])
    if name in ("ssmax", "sigmoid", "relu"):  # their count of visible keys is the mask's, which a bias does not change
        assert torch.isfinite(out).all()
    else:
        assert torch.allclose(out, masked, atol=1e-5)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("name", WEIGHTED)
def test_long_rows(name):
    call = sample(name, dtype=torch.float32, q_len=3, k_len=20000, heads=1, kv_heads=1, batch=1)
    checked(call, 2e-4)
