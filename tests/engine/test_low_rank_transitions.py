"""Recurrences whose transition is diagonal plus low rank: every execution equals the recurrence as written, in values and gradients."""

import pytest
import torch

import regard
from regard import Causal, RegardError
from regard.algebra import Padding, Recurrent
from regard.algebra.states import LogLinear
from regard.engine import step

KINDS = {"none": None, "head": (3,), "token": (2, 3, 90), "channel": (2, 3, 90, 5)}


def given(decay, length=90, strong=1.0, dtype=torch.float64):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, d, dtype=dtype, requires_grad=True) for d in (5, 5, 4))
    key = torch.nn.functional.normalize(torch.randn(2, 3, length, 5, dtype=dtype), dim=-1)
    a, b = (-key).requires_grad_(), (key * torch.rand(2, 3, length, 5, dtype=dtype)).requires_grad_()
    inputs = {"erase": a, "insert": b}
    if KINDS[decay] is not None:
        shape = tuple(length if n == 90 else n for n in KINDS[decay])
        inputs["log_decay"] = (-strong * torch.rand(shape, dtype=dtype)).requires_grad_()
    return q, k, v, inputs


def by_hand(q, k, v, inputs, decay):
    outs = []
    for n in range(q.shape[0]):
        for h in range(q.shape[1]):
            state, rows = torch.zeros(5, 4, dtype=q.dtype), []
            for t in range(q.shape[2]):
                log = inputs.get("log_decay")
                fade = (
                    1.0
                    if log is None
                    else torch.exp(
                        {"head": lambda: log[h], "token": lambda: log[n, h, t], "channel": lambda: log[n, h, t][:, None]}[decay]()
                    )
                )
                read = inputs["erase"][n, h, t] @ state
                state = fade * state + torch.outer(inputs["insert"][n, h, t], read) + torch.outer(k[n, h, t], v[n, h, t])
                rows.append(q[n, h, t] @ state / 5**0.5)
            outs.append(torch.stack(rows))
    return torch.stack(outs).view(*q.shape[:3], 4)


@pytest.mark.parametrize("decay", KINDS)
def test_chunks_equal_the_recurrence(decay):
    q, k, v, inputs = given(decay)
    found, truth = regard.attend(q, k, v, Recurrent(decay=decay, write="dplr"), **inputs), by_hand(q, k, v, inputs, decay)
    seed, leaves = torch.randn_like(truth), (q, k, v, *inputs.values())
    assert torch.allclose(found, truth, atol=1e-10)
    for a, b in zip(torch.autograd.grad(found, leaves, seed), torch.autograd.grad(truth, leaves, seed), strict=True):
        assert torch.allclose(a, b, atol=1e-8)


@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize("strong", [1.0, 30.0])
def test_all_executions_agree(decay, strong):
    from regard.engine.recurrent.pose import pose
    from regard.engine.recurrent.run import run

    q, k, v, inputs = given(decay, strong=strong)
    scan = pose(Recurrent(decay=decay, write="dplr"), Causal(), q, k, v, None, inputs)
    truth = run(scan, "step")
    for size in (1, 7, 64, 128):
        out, state = run(scan, "chunk", chunk_size=size)
        assert torch.allclose(out, truth[0], atol=1e-9) and torch.allclose(state, truth[1], atol=1e-9)
    assert torch.allclose(run(scan, "parallel")[0], truth[0], atol=1e-9)


def test_streams_padding_and_shared_heads():
    q, k, v, inputs = given("channel")
    mechanism, state, parts = Recurrent(decay="channel", write="dplr"), None, []
    whole = regard.attend(q, k, v, mechanism, **inputs)
    for a, b in ((0, 70), (70, 71), (71, 90)):
        out, state = step(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], mechanism, state, **{n: x[:, :, a:b] for n, x in inputs.items()})
        parts.append(out)
    assert torch.allclose(torch.cat(parts, 2), whole, atol=1e-9)
    keep = torch.arange(90) >= torch.tensor([[0], [20]])
    junk = {n: torch.where(keep[:, None, :, None], x, torch.nan) for n, x in inputs.items()}
    padded = regard.attend(q, k, v, mechanism, mask=Causal() & Padding(), keep=keep, **junk)
    alone = regard.attend(q[1:, :, 20:], k[1:, :, 20:], v[1:, :, 20:], mechanism, **{n: x[1:, :, 20:] for n, x in inputs.items()})
    assert torch.allclose(padded[1:, :, 20:], alone, atol=1e-9)
    shared = regard.attend(q, k[:, :1], v[:, :1], mechanism, **inputs)
    assert torch.allclose(shared, regard.attend(q, k[:, :1].expand_as(k), v[:, :1].expand_as(v), mechanism, **inputs))
    single = regard.attend(q.float(), k.float(), v.float(), mechanism, **{n: x.float() for n, x in inputs.items()})
    assert torch.allclose(single.double(), whole, atol=1e-4)


def test_refusals():
    q, k, v, inputs = given("none", 6)
    mechanism = Recurrent(write="dplr")
    assert torch.allclose(
        regard.attend(q, k, v, mechanism, erase=inputs["erase"] * 0, insert=inputs["insert"]),
        regard.attend(q, k, v, Recurrent(causal=True), mask=Causal()),
    )
    for bad in ({"erase": inputs["erase"]}, {**inputs, "erase": inputs["erase"][..., :3]}, {**inputs, "beta": torch.rand(2, 3, 6)}):
        with pytest.raises(RegardError):
            regard.attend(q, k, v, mechanism, **bad)
    for make in (
        lambda: Recurrent(write="dpl"),
        lambda: LogLinear(inner=Recurrent(write="dplr")),
        lambda: Recurrent(write="dplr", keys="softmax"),
    ):
        with pytest.raises(RegardError, match="expected"):
            make()
