"""Plain functions: what they depend on is found, what they captured is read at every call, and nothing of them is kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import regard
from regard import RegardError, RowLocal, Weighted
from regard.algebra import Input, Modified
from regard.algebra.snapshot import as_now, fixed
from regard.engine.settle import settle

EXECUTORS = (None, "tiled", "native", "reference")
SIZE = 4  # of a window, read by a function below


def softmax(q, k, v, seen):
    s = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    p = torch.exp(s - s.amax(-1, keepdim=True).clamp_min(-1e30))
    return p / p.sum(-1, keepdim=True).clamp_min(1e-300) @ v.double()


def qkv(length, heads=3, batch=2):
    torch.manual_seed(length)
    return [torch.randn(batch, heads, length, 16, requires_grad=True) for _ in range(3)]


def places(length):
    return torch.arange(length)[:, None], torch.arange(length)


OF_PLACE = {
    "heads": lambda b, h, i, j: (j <= i) & (i - j < 6 + 100 * h),
    "batches": lambda b, h, i, j: (j <= i) & ((j % 3 == b) | (i == j)),
    "both": lambda b, h, i, j: (j <= i) & (i - j < 9 * (1 + h) + 200 * b),
    "heads, by a table": lambda b, h, i, j: (j <= i) & (i - j < torch.tensor([5, 60, 400])[h]),
    "batches, by documents": lambda b, h, i, j: (
        torch.tensor([[0, 1], [1, 1]])[b, (i > 20).long()] == torch.tensor([[0, 1], [1, 1]])[b, (j > 20).long()]
    ),
}


@pytest.mark.parametrize("combined", ["plain", "and", "or", "not", "own"])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("case", OF_PLACE)
def test_masks_of_heads_and_batches(case, executor, combined):
    function, length = OF_PLACE[case], 300
    q, k, v = qkv(length)
    i, j = places(length)
    b, h = torch.arange(2)[:, None, None, None], torch.arange(3)[:, None, None]
    seen = function(b, h, i, j).expand(2, 3, length, length)
    near = (i - j).abs() < 30
    mask, seen = {
        "plain": (function, seen),
        "and": (regard.Window(30) & function, seen & near),
        "or": (regard.Window(30) | function, seen | near),
        "not": (~regard.algebra.as_mask(function) | regard.Sinks(1), ~seen | (j < 1)),
        "own": (None, seen),
    }[combined]
    mechanism = Weighted(mask=function) if combined == "own" else "softmax"
    if executor == "native" and "by" in case:
        with pytest.raises(RegardError, match="cannot run this"):
            regard.attend(q, k, v, mechanism, mask=mask, executor=executor)
        return
    out, truth = regard.attend(q, k, v, mechanism, mask=mask, executor=executor), softmax(q, k, v, seen)
    assert torch.allclose(out.double(), truth, atol=2e-5)
    for a, c in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), torch.autograd.grad(truth.square().sum(), (q, k, v)), strict=True):
        assert torch.allclose(a, c, atol=1e-4)


@pytest.mark.parametrize("length", [40, 300])
def test_visible_counts_of_masks_that_look_at_heads(length):
    q, k, v = qkv(length)
    counting = Weighted(normalizer=RowLocal(lambda s, n: torch.ones_like(s) / n))
    i, j = places(length)
    seen = (j <= i) & (i - j < 4 * (1 + torch.arange(3)[:, None, None]))
    truth = (seen / seen.sum(-1, keepdim=True)).double() @ v.double()
    out = regard.attend(q, k, v, counting, mask=lambda b, h, i, j: (j <= i) & (i - j < 4 * (1 + h)))
    assert torch.allclose(out.double(), truth, atol=1e-5)


class Settings:
    def __init__(self, size):
        self.size = size

    def __call__(self, b, h, i, j):
        return (j <= i) & (i - j < self.size)

    def method(self, b, h, i, j):
        return (j <= i) & (i - j < self.size)


def of_global(b, h, i, j):
    return (j <= i) & (i - j < SIZE)


def changing():
    """Functions of a window, and how to change its size."""
    settings, numbers, table = Settings(0), [0], {"size": 0}
    size = torch.zeros((), dtype=torch.long)

    def nonlocal_size():
        held = 0

        def put(value):
            nonlocal held
            held = value

        return put, lambda b, h, i, j: (j <= i) & (i - j < held)

    put, function = nonlocal_size()
    return {
        "closure": (function, put),
        "attribute": (lambda b, h, i, j: (j <= i) & (i - j < settings.size), lambda n: setattr(settings, "size", n)),
        "object": (settings, lambda n: setattr(settings, "size", n)),
        "method": (settings.method, lambda n: setattr(settings, "size", n)),
        "list": (lambda b, h, i, j: (j <= i) & (i - j < numbers[0]), lambda n: numbers.__setitem__(0, n)),
        "dict": (lambda b, h, i, j: (j <= i) & (i - j < table["size"]), lambda n: table.__setitem__("size", n)),
        "tensor": (lambda b, h, i, j: (j <= i) & (i - j < size), lambda n: size.fill_(n)),
        "table": (lambda b, h, i, j: (j <= i) & (i - j < size.expand(3)[h]), lambda n: size.fill_(n)),
        "global": (of_global, lambda n: globals().__setitem__("SIZE", n)),
        "inner": (lambda b, h, i, j: function(b, h, i, j), put),
        "bound method": (lambda b, h, i, j, get=table.get: (j <= i) & (i - j < get("size")), lambda n: table.__setitem__("size", n)),
    }


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("case", sorted(changing()))
def test_contents_decide(case, executor):
    function, put = changing()[case]
    length = 300
    q, k, v = qkv(length)
    i, j = places(length)
    if executor == "native" and case == "table":
        pytest.skip("no expression: refused, see above")
    for size in (4, 200, 4):
        put(size)
        out = regard.attend(q, k, v, mask=function, executor=executor)
        assert torch.allclose(out.double(), softmax(q, k, v, (j <= i) & (i - j < size)), atol=2e-5), size


@pytest.mark.parametrize("executor", EXECUTORS)
def test_contents_of_weights_and_positions_decide(executor):
    q, k, v = qkv(40)
    held = [1.0]
    mechanism = Weighted(position=lambda s, i, j: s - held[0] * (i - j).abs(), normalizer=RowLocal(lambda s: torch.relu(s) * held[0]))
    i, j = places(40)
    for held[0] in (0.1, 1.0, 0.1):
        s = q.double() @ k.double().mT / 4 - held[0] * (i - j).abs()
        out = regard.attend(q, k, v, mechanism, executor=executor)
        assert torch.allclose(out.double(), torch.relu(s) * held[0] @ v.double(), atol=2e-5)


def test_what_backward_uses_is_what_forward_saw():
    q, k, v = qkv(40)
    held = [2.0]
    mechanism = Weighted(normalizer=RowLocal(lambda s: torch.relu(s) * held[0]))
    out = regard.attend(q, k, v, mechanism, executor="tiled")
    held[0] = 5.0
    (grad,) = torch.autograd.grad(out.sum(), v)
    weights = torch.relu(q.double() @ k.double().mT / 4) * 2.0
    assert torch.allclose(grad.double(), weights.sum(-2)[..., None].expand_as(grad), atol=2e-5)


@pytest.mark.parametrize("where", ["mask", "weight", "position"])
def test_captured_tensors_are_let_go(where):
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    alive = []

    def once(number):
        big = torch.ones(100_000) * number
        alive.append(weakref.ref(big))
        if where == "mask":
            regard.attend(q, k, v, mask=lambda b, h, i, j: (big[i] > 0) & (j <= i))
        elif where == "weight":
            regard.attend(q, k, v, Weighted(normalizer=RowLocal(lambda s: torch.relu(s) * big[0])))
        else:
            regard.attend(q, k, v, Weighted(position=lambda s, i: s + big[i]))

    for number in range(12):
        once(number)
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= 1


def test_equal_contents_are_equal():
    def window(size):
        return lambda b, h, i, j: (j <= i) & (i - j < size)

    one, same, other = (as_now(regard.algebra.as_mask(window(size))) for size in (4, 4, 5))
    assert fixed(one) and one == same and hash(one) == hash(same) and one != other
    live = regard.algebra.as_mask(Settings(3))
    assert not fixed(live) and fixed(settle(live)) and settle(live) == settle(regard.algebra.as_mask(Settings(3)))
    tensor = torch.arange(9)
    assert not fixed(settle(regard.algebra.as_mask(lambda b, h, i, j: tensor[i] == tensor[j])))


def test_numbers_that_change_at_every_call_are_not_compiled_for():
    q = torch.randn(1, 4, 1024, 16)
    used = []
    for number in range(20):
        plan = regard.plan(q, q, q, Weighted(normalizer=RowLocal(lambda s, number=number: torch.relu(s) * number)))
        used.append(plan.executor)
    assert used[-1] == "tiled" and "other numbers" in str(plan)
    assert regard.plan(q, q, q, "relu").executor == used[0]


def test_learned_captures_are_refused():
    q, k, v = qkv(12)
    slope = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(RegardError, match="declare it with inputs"):
        regard.attend(q, k, v, Weighted(position=lambda s, i, j: s - slope * (i - j)))
    declared = Weighted(position=Modified(lambda s, i, j, slope: s - slope * (i - j), inputs=(Input("slope", ""),)))
    (grad,) = torch.autograd.grad(regard.attend(q, k, v, declared, slope=slope).square().sum(), slope)
    assert grad.isfinite() and grad != 0
    held = {"slope": slope}
    with pytest.raises(RegardError, match="declare it with inputs"):
        regard.attend(q, k, v, Weighted(position=lambda s, i, j: s - held["slope"] * (i - j)))
    with torch.no_grad():
        regard.attend(q, k, v, Weighted(position=lambda s, i, j: s - slope * (i - j)))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_detached_scores_carry_no_gradient(executor):
    q, k, v = qkv(40)
    out = regard.attend(q, k, v, Weighted(normalizer=RowLocal(lambda s: s * s.detach())), executor=executor)
    s = q.double() @ k.double().mT / 4
    truth = s * s.detach() @ v.double()
    for a, c in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), torch.autograd.grad(truth.square().sum(), (q, k, v)), strict=True):
        assert torch.allclose(a.double(), c.double(), rtol=1e-3, atol=1e-3 * float(c.abs().max()))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("infinity", [float("-inf"), torch.tensor(float("-inf"))], ids=["number", "tensor"])
def test_infinite_constants(executor, infinity):
    q, k, v = qkv(40)
    i, j = places(40)
    out = regard.attend(q, k, v, Weighted(position=lambda s, i, j: torch.where(j <= i, s, infinity)), executor=executor)
    truth = softmax(q, k, v, j <= i)
    assert torch.allclose(out.double(), truth, atol=2e-5)
    for a, c in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), torch.autograd.grad(truth.square().sum(), (q, k, v)), strict=True):
        assert torch.allclose(a, c, atol=1e-4)
