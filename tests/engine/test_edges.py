"""Calls at the edge of what is a call: nothing to compute, no heads, float masks, negative scales, other default dtypes."""

from __future__ import annotations

import pytest
import torch
from samples import NAMES, described, sample

import regard
from regard import Causal, RegardError, Window
from regard.algebra import Recurrent, Weighted

WEIGHTED = [n for n in NAMES if isinstance(described(n), Weighted)]


@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (0, 0, 0)], ids=["no batch", "no queries", "no keys", "nothing"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_compute(name, sizes):
    batch, q_len, k_len = sizes
    mechanism = described(name)
    inputs = {
        k: x
        for k, x in sample(name).inputs.items()
        if not set("bqk") & set(next((i.shape for i in mechanism.declared if i.name == k), "b"))
    }
    for mask in (None, Causal(), Causal() & Window(3)):
        q, k, v = (torch.randn(batch, 4, n, d, dtype=torch.float64, requires_grad=True) for n, d in ((q_len, 8), (k_len, 8), (k_len, 6)))
        try:
            out = regard.attend(q, k, v, mechanism, mask=mask, **inputs)
        except RegardError as error:
            assert "is missing" in str(error) or "mask" in str(error)
            continue
        assert out.shape == (batch, 4, q_len, 6) and not out.any()
        out.sum().backward()
        assert not any(x.grad.any() for x in (q, k, v))


@pytest.mark.parametrize("name", ["softmax", "softpick", "moba", "performer", "entmax"])
def test_plan_of_nothing(name):
    q, k = torch.randn(0, 4, 5, 8), torch.randn(0, 4, 5, 8)
    assert "nothing to compute" in str(regard.plan(q, k, k, name))


@pytest.mark.parametrize("name", NAMES)
def test_without_heads(name):
    call = sample(name, heads=1, kv_heads=1)
    options = {"mask": Causal() if call.causal else None, **call.inputs}
    try:
        whole = regard.attend(call.q, call.k, call.v, call.mechanism, **options)
    except RegardError:
        pytest.skip("not for a single head")
    out = regard.attend(call.q[:, 0], call.k[:, 0], call.v[:, 0], call.mechanism, **options)
    assert torch.equal(out, whole[:, 0])
    with pytest.raises(RegardError, match="k is"):
        regard.attend(call.q[:, 0], call.k, call.v, call.mechanism)


def added(q, k, bias, weights):
    s = q @ k.mT * q.shape[-1] ** -0.5
    seen = bias > float("-inf")
    return weights(torch.where(seen, s + torch.where(seen, bias, 0.0), float("-inf")))


def softmax_of(s):
    p = torch.exp(s - s.amax(-1, keepdim=True).clamp_min(-1e30))
    return p / p.sum(-1, keepdim=True).clamp_min(1e-300)


@pytest.mark.parametrize("executor", [None, "tiled", "native", "reference"])
@pytest.mark.parametrize("shape", [(2, 3, 40, 40), (1, 3, 40, 40), (40, 40), (2, 1, 1, 40)])
def test_float_masks_are_added(shape, executor):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 40, 16, requires_grad=True) for _ in range(3))
    bias = torch.randn(shape)
    bias[..., 7:12] = float("-inf")
    if shape[-2] == 40:
        bias[..., 5, :] = float("-inf")  # a row that sees nothing
    bias.requires_grad_()
    out = regard.attend(q, k, v, mask=bias, executor=executor)
    truth = added(q.double(), k.double(), bias.double(), softmax_of) @ v.double()
    assert torch.allclose(out.double(), truth, atol=2e-5)
    leaves = (q, k, v, bias)
    for a, b in zip(torch.autograd.grad(out.square().sum(), leaves), torch.autograd.grad(truth.square().sum(), leaves), strict=True):
        assert a.isfinite().all() and torch.allclose(a, b, atol=1e-4)


def test_tensors_that_are_no_masks():
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    for number in (float("nan"), float("inf")):
        with pytest.raises(RegardError, match="mask holds NaN or inf"):
            regard.attend(q, k, v, mask=torch.full((6, 6), number))
    table = torch.ones(6, 6, dtype=torch.bool).triu(-2)
    with pytest.raises(RegardError, match="Explicit"):
        Causal() & table
    joined = regard.attend(q, k, v, mask=Causal() & regard.algebra.Explicit(), visible=table[None, None])  # what the message says
    assert torch.allclose(joined, regard.attend(q, k, v, mask=table.tril()), atol=1e-6)


def test_float_masks_of_other_mechanisms():
    q, k, v = (torch.randn(2, 3, 20, 8, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(3, 20, 20, dtype=torch.float64)
    s = q @ k.mT * 8**-0.5 + bias
    assert torch.allclose(regard.attend(q, k, v, "sigmoid", mask=bias, bias=torch.tensor([-2.0] * 3)), torch.sigmoid(s - 2.0) @ v)
    from regard.algebra import Chain, Modified, Softcap

    capped = regard.Weighted(position=Softcap(2.0))
    truth = softmax_of(2 * torch.tanh((q @ k.mT * 8**-0.5) / 2) + bias) @ v
    assert torch.allclose(regard.attend(q, k, v, capped, mask=bias), truth)
    both = regard.Weighted(position=(Modified(lambda s, i, j: s - 0.1 * (i - j).abs()), Modified(lambda s: s * 2)))
    i, j = torch.arange(20)[:, None], torch.arange(20)
    truth = softmax_of(2 * (q @ k.mT * 8**-0.5 - 0.1 * (i - j).abs())) @ v
    assert torch.allclose(regard.attend(q, k, v, both), truth) and isinstance(both.position, Chain)
    with pytest.raises(RegardError, match="no scores to add it to"):
        regard.attend(q, k, v, "performer", mask=bias)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1e-30, 3.0])
@pytest.mark.parametrize("masked", ["none", "causal", "window", "tensor"])
@pytest.mark.parametrize("executor", [None, "tiled", "native", "reference"])
def test_every_scale(executor, masked, scale):
    q, k, v = (torch.randn(1, 2, 37, 16, requires_grad=True) for _ in range(3))
    i, j = torch.arange(37)[:, None], torch.arange(37)
    seen = {"none": (i == i) & (j == j), "causal": j <= i, "window": (j <= i) & (i - j < 9), "tensor": (i + j) % 3 > 0}[masked]
    mask = {"none": None, "causal": Causal(), "window": Causal() & Window(9), "tensor": seen}[masked]
    out = regard.attend(q, k, v, mask=mask, scale=scale, executor=executor)
    truth = softmax_of((q.double() @ k.double().mT * scale).masked_fill(~seen, float("-inf"))) @ v.double()
    for a, b in zip(
        (out, *torch.autograd.grad(out.square().sum(), (q, k, v))),
        (truth, *torch.autograd.grad(truth.square().sum(), (q, k, v))),
        strict=True,
    ):
        assert float((a - b).abs().max()) <= 1e-4 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_default_dtype_of_float64(name):
    """The dtype of tensors decides, not torch's default."""
    call = sample(name, dtype=torch.float32)
    options = {"mask": Causal() if call.causal else None}
    before = call.run(**options)
    torch.set_default_dtype(torch.float64)
    try:
        after = call.run(**options)
        wide = sample(name).run(**options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert after.dtype == torch.float32 and wide.dtype == torch.float64
    assert torch.allclose(after, before, rtol=1e-5, atol=1e-5 * max(1.0, float(before.abs().max())))


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(described(n), Recurrent) and described(n).causal_only])
def test_causal_recurrences_say_that_they_are(name):
    call = sample(name)
    with pytest.raises(RegardError, match="reads the past alone"):
        call.run(mask=regard.Full())
    assert torch.equal(call.run(), call.run(mask=Causal()))
