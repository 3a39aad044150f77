"""What every mechanism must do, written once and run over the registry."""

from __future__ import annotations

import pytest
import torch
from samples import CAUSAL, NAMES, described, sample

import regard
from regard import Causal
from regard.algebra import LogLinear, Recurrent, Relayed, Slots, Weighted
from regard.algebra.mechanism import Clustered, Nystrom

SAME_GRID = ("draftattention", "nabla", "vmoba")  # queries and keys are the same video's tokens
MASKABLE = [n for n in NAMES if isinstance(described(n), Weighted)]
CROSS = [
    n
    for n in NAMES
    if not (isinstance(described(n), (Recurrent, Slots, LogLinear)) and described(n).causal_only)
    and n not in ("moba", "sparse-transformer", *SAME_GRID)
]


def close(a, b, tolerance):
    assert a.shape == b.shape and a.dtype == b.dtype
    gap = float((a - b).abs().max()) if a.numel() else 0.0
    assert torch.isfinite(a).all() and gap <= tolerance, gap


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", NAMES)
def test_equals_reference(name, kv_heads):
    call = sample(name, kv_heads=kv_heads)
    assert call.run().shape == (2, 4, 29, 6)
    close(call.run(), call.run(executor="reference"), 1e-9)
    if call.causal:
        close(call.run(mask=Causal()), call.run(mask=Causal(), executor="reference"), 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_reference(name):
    call = sample(name)
    mask = Causal() if call.causal else None
    leaves = [call.q, call.k, call.v] + [x for x in call.inputs.values() if x.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    grads = []
    for executor in (None, "reference"):
        out = call.run(mask=mask, executor=executor)
        grads.append(torch.autograd.grad(out.square().sum(), leaves, allow_unused=True))
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b, 1e-7)


@pytest.mark.parametrize("name", CAUSAL)
def test_does_not_read_the_future(name):
    call, other = sample(name), sample(name)
    for x in (other.q, other.k, other.v):
        x[:, :, 17:] = torch.randn_like(x[:, :, 17:])
    if isinstance(call.mechanism, Recurrent) and call.mechanism.write == "delta":
        other.k = torch.nn.functional.normalize(other.k, dim=-1)
    close(other.run(mask=Causal())[:, :, :17], call.run(mask=Causal())[:, :, :17], 1e-12)


@pytest.mark.parametrize("name", CROSS)
def test_cross_lengths(name):
    close(*[sample(name, q_len=13, k_len=31).run(executor=e) for e in (None, "reference")], 1e-9)
    close(*[sample(name, q_len=31, k_len=13).run(executor=e) for e in (None, "reference")], 1e-9)


@pytest.mark.parametrize("name", CAUSAL)
def test_last_rows_alone_equal_the_full_pass(name):
    """Decode with Lq < Lk: queries stand at the end of the keys."""
    call = sample(name)
    whole = call.run(mask=Causal())
    for n in (1, 7):
        part = regard.attend(call.q[:, :, -n:], call.k, call.v, call.mechanism, mask=Causal(), **call.inputs)
        close(part, whole[:, :, -n:], 1e-10)


@pytest.mark.parametrize("name", CAUSAL)
def test_step_equals_full_pass(name):
    call = sample(name)
    whole, state, outs = call.run(mask=Causal()), None, []
    for start, stop in ((0, 11), (11, 12), (12, 13), (13, 20), (20, 29)):
        now = {}
        for item in regard.engine.composed.inputs_of(call.mechanism):
            x = call.inputs.get(item.name)
            if x is not None:
                at = item.shape.find("k")
                now[item.name] = x if at < 0 else x.narrow(at, start, stop - start)
        out, state = regard.step(*[x[:, :, start:stop] for x in (call.q, call.k, call.v)], call.mechanism, state, **now)
        outs.append(out)
    close(torch.cat(outs, 2), whole, 1e-10)
    assert state.length == 29 and state.bytes > 0


@pytest.mark.parametrize("name", MASKABLE)
def test_fully_masked_rows_are_zero_with_zero_gradient(name):
    call = sample(name)
    seen = torch.ones(29, 29, dtype=torch.bool)
    seen = seen if name == "sinkformer" else seen.tril()  # its rows depend on one another, so a triangle is refused
    seen[3] = seen[20] = False
    leaves = [x.requires_grad_() for x in (call.q, call.k, call.v)]
    out = call.run(mask=seen)
    assert (out[:, :, [3, 20]] == 0).all()
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[0][:, :, [3, 20]] == 0).all()


@pytest.mark.parametrize("name", MASKABLE)
def test_padding_equals_the_shorter_call(name):
    if name in ("sinkformer", "neighborhood", "moba", "dhsa"):
        pytest.skip("rows depend on the number of queries, or on the grid's or blocks' size, so the shorter call is another problem")
    call = sample(name)
    keep = torch.ones(2, 29, dtype=torch.bool)
    keep[:, 20:] = False
    padded = call.run(mask=regard.Padding(), keep=keep)
    short = regard.attend(call.q[:, :, :20], call.k[:, :, :20], call.v[:, :, :20], call.mechanism, **call.inputs)
    close(padded[:, :, :20], short, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name, dtype):
    call = sample(name, dtype=dtype)
    mask = Causal() if call.causal else None
    out = call.run(mask=mask)
    assert out.dtype == dtype
    exact = call.to(torch.float64).run(mask=mask, executor="reference")
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}[dtype] * max(1.0, float(exact.abs().max()))
    close(out.double(), exact, tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous_inputs(name):
    call = sample(name)
    turned = sample(name)
    turned.q, turned.k, turned.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (call.q, call.k, call.v))
    # Products of other strides may be summed in another order, which solving a linear system for each query amplifies.
    close(turned.run(), call.run(), 1e-10 if name == "local-linear-attention" else 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile(name):
    """Values and gradients inside a compiled function; executors other than SDPA's run between its compiled parts."""
    call = sample(name).to(torch.float32)
    leaf = call.v.requires_grad_()
    found = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="eager")):
        out = wrap(lambda x: 2 * regard.attend(call.q, call.k, 1.0 * x, call.mechanism, **call.inputs))(leaf)
        found.append((out.detach(), *torch.autograd.grad(out.sum(), leaf)))
    for plain, compiled in zip(*found, strict=True):
        close(compiled, plain, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_one_key_and_one_query(name):
    call = sample(name, q_len=1, k_len=1)
    close(call.run(), call.run(executor="reference"), 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_repr_rebuilds_and_hashes(name):
    mechanism = described(name)
    assert eval(repr(mechanism), {"regard": regard, "torch": torch}) == mechanism
    assert hash(described(name)) == hash(mechanism)
    assert regard.plan(*[getattr(sample(name), x) for x in "qkv"], mechanism, **sample(name).inputs).executor


@pytest.mark.parametrize("name", NAMES)
def test_layer_trains_and_steps(name):
    mechanism = described(name)
    causal = mechanism.can_be_causal or mechanism.causal_only
    layer = regard.nn.Attention(16, 2, mechanism, causal=causal, rope=True).double()
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    y = layer(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    missing = [n for n, p in layer.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing
    if causal:
        with torch.no_grad():
            first, state = layer.step(x[:, :9])
            outs = [first]
            for t in range(9, 21):
                out, state = layer.step(x[:, t : t + 1], state)
                outs.append(out)
        close(torch.cat(outs, 1), y.detach(), 1e-9)


@pytest.mark.parametrize("scale", [1e-4, 100.0])
@pytest.mark.parametrize("name", MASKABLE)
def test_extreme_scores_stay_finite(name, scale):
    call = sample(name, dtype=torch.float32)
    call.q = call.q * scale
    leaves = [x.requires_grad_() for x in (call.q, call.k, call.v)]
    out = call.run(mask=Causal() if call.causal else None)
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), leaves))


def test_every_shape_of_mechanism_is_registered():
    kinds = {type(described(name)) for name in NAMES}
    assert {Weighted, Recurrent, Relayed, Nystrom, Clustered} <= kinds
