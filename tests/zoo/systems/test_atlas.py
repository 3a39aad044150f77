"""aTLAS: tied weights, half precision, calls of other shapes, bad input."""

import copy

import pytest
import torch
from torch import nn

from regard import RegardError
from regard.adapt.task_vectors import TaskVectors
from regard.zoo.systems.atlas import Atlas, adaptation_loss, penalty, trusted


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(3))

    def forward(self, ids, *, scale=1.0):
        return self.head(self.embed(ids)) * scale


def moved(model, by=0.5):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(by * torch.randn_like(p))
    return other


def test_tied_weights_are_one_block_and_named_arguments_arrive():
    base = Tied()
    other, ids = moved(base), torch.tensor([[0, 5, 2]])
    made = Atlas(base, TaskVectors(base, [other]))
    assert made.coefficients.shape == (1, 1)
    made.coefficients.data.fill_(1.0)
    assert torch.allclose(made(ids, scale=2.0), other(ids, scale=2.0))
    state = made.merge()
    assert set(state) == set(base.state_dict()) and torch.equal(state["head.weight"], state["embed.weight"])
    assert torch.allclose(state["embed.weight"], other.embed.weight) and state["count"] == 3


def test_base_is_left_alone_and_only_coefficients_learn():
    base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = copy.deepcopy(base.state_dict())
    made = Atlas(base, TaskVectors(base, [moved(base), moved(base).state_dict()]), partition=3)
    made(torch.randn(1, 3)).sum().backward()
    assert [name for name, p in made.named_parameters() if p.requires_grad] == ["coefficients"]
    assert made.coefficients.abs().sum() == 0 and made.coefficients.grad.shape == (2, 4, 3)
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in base.parameters())


def test_vectors_in_half_precision_take_half_the_bytes():
    base = nn.Linear(8, 8)
    other = moved(base)
    whole, half = TaskVectors(base, [other]), TaskVectors(base, [other], dtype=torch.float16)
    assert 2 * half.bytes == whole.bytes and whole.strongest(torch.tensor([[1.0, 2.0]]), 1).bytes == 8 * 4
    made = Atlas(base, half)
    made.coefficients.data.fill_(1.0)
    x = torch.randn(2, 8)
    assert made(x).dtype == torch.float32 and torch.allclose(made(x), other(x), atol=1e-2)
    low = base.to(torch.bfloat16)
    assert Atlas(low, TaskVectors(low, [moved(low)])).coefficients.dtype == torch.float32


def test_nothing_is_sure_enough():
    logits = torch.zeros(3, 4, requires_grad=True)
    loss = adaptation_loss(logits, logits)
    loss.backward()
    assert loss == 0 and logits.grad.isfinite().all()


def test_targets_as_sure_as_the_bound_are_left_out_and_what_each_block_got_is_told():
    even = torch.zeros(2, 4)
    assert adaptation_loss(even, torch.randn(2, 4), above=0.25) == 0
    weak = torch.tensor([[9.0, 0, 0, 0], [0, 1.0, 0, 0]])
    strong = torch.randn(2, 4)
    only = -(weak[0].softmax(-1) * strong[0].log_softmax(-1)).sum()
    assert adaptation_loss(weak, strong) == pytest.approx(float(only))  # the second is not sure enough
    base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for options, values, told in (
        ({}, torch.arange(8.0).view(2, 4), {"1.bias": [3, 7], "0.weight": [0, 4]}),
        ({"isotropic": True}, torch.tensor([2.0, -3]), {"1.bias": [2, -3], "0.weight": [2, -3]}),
        ({"partition": 2}, torch.arange(16.0).view(2, 4, 2), {"1.bias": [6.5, 14.5], "0.weight": [0.5, 8.5]}),
    ):
        made = Atlas(base, TaskVectors(base, [moved(base), moved(base)]), **options)
        made.coefficients.data.copy_(values)
        assert told.items() <= dict(made.report()).items()
        sizes = [max(abs(x) for x in own) for _, own in made.report()]
        assert sizes == sorted(sizes, reverse=True) and len(sizes) == 4
    assert penalty(torch.tensor([3.0, -4]), l1=2, l2=10) == 14 + 250 and penalty(torch.ones(2)) == 0


def test_linearised_learns_and_wants_a_tensor():
    base = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    vectors = TaskVectors(base, [moved(base)])
    line, full = (Atlas(base, vectors, linearised=one) for one in (True, False))
    x = torch.randn(1, 3, dtype=torch.float64)
    slopes = []
    for made in (line, full):
        made(x).sum().backward()
        slopes.append(made.coefficients.grad)
    assert torch.allclose(*slopes)  # at zero both have the same slope

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x):
            return {"text": "no tensor", "logits": self.inner(x)}

    named = Named()
    with pytest.raises(RegardError, match="linearised"):
        Atlas(named, TaskVectors(named, [moved(named)]), linearised=True)(torch.randn(1, 3))


def test_what_cannot_be_is_refused():
    base = nn.Linear(3, 2)
    vectors = TaskVectors(base, [moved(base)])
    for call in (
        lambda: TaskVectors(base, []),
        lambda: TaskVectors(base, [nn.Linear(3, 4)]),
        lambda: TaskVectors(nn.Tanh(), [nn.Tanh()]),
        lambda: Atlas(nn.Linear(4, 2), vectors),
        lambda: Atlas(base, vectors, partition=0),
        lambda: Atlas(base, vectors, partition=2, isotropic=True),
        lambda: Atlas(base, vectors, partition=2, groups={(2, 3): torch.full((2, 3), 2), (2,): torch.zeros(2, dtype=torch.long)}),
        lambda: Atlas(base, vectors, groups={}),
        lambda: vectors.strongest(torch.zeros(1, 2), 3),
        lambda: vectors.strongest(torch.zeros(1, 3), 1),
        lambda: trusted(torch.zeros(2, 3), 3),
        lambda: adaptation_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)),
    ):
        with pytest.raises(RegardError, match="expected"):
            call()
