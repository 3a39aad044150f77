"""Documents packed into one sequence: recurrences equal a run of each document by itself, gradients included."""

import pytest
import torch

import regard
from regard import Causal, RegardError, Segments

LENGTHS = [[5, 1, 17, 7], [13, 5, 12]]
IDS = torch.stack([torch.repeat_interleave(torch.arange(len(one)) + 3, torch.tensor(one)) for one in LENGTHS])
NAMES = ["gla", "deltanet", "lightning-attention-2", "based", "gsa", "log-linear-attention", "cosformer", "regla", "softmax"]


def rows(*channels):
    return torch.rand(2, 2, 30, *channels, dtype=torch.float64)


INPUTS = {
    "gla": lambda: {"log_decay": -rows(8)},
    "regla": lambda: {"log_decay": -rows(8)},
    "deltanet": lambda: {"beta": rows()},
    "gsa": lambda: {"log_forget": -rows(4), "write": rows(4)},
    "log-linear-attention": lambda: {"log_decay": -rows(), "level_scales": rows(6)},
}


@pytest.mark.parametrize("name", NAMES)
def test_documents_alone(name):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 30, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    given = INPUTS.get(name, dict)()
    out = regard.attend(q, k, v, name, mask=Causal() & Segments(), segments=IDS, **given)
    truth = torch.zeros_like(out)
    for b, lengths in enumerate(LENGTHS):
        start = 0
        for n in lengths:
            part = slice(start, start + n)
            mine = {key: x[b : b + 1, :, part] for key, x in given.items()}
            truth[b, :, part] = regard.attend(*[x[b : b + 1, :, part] for x in (q, k, v)], name, mask=Causal(), **mine)[0]
            start += n
    assert torch.allclose(out, truth, atol=1e-10)
    seed = torch.randn_like(out)
    for one, other in zip(torch.autograd.grad(out, (q, k, v), seed, True), torch.autograd.grad(truth, (q, k, v), seed), strict=True):
        assert torch.allclose(one, other, atol=1e-10)


def test_bad_documents_are_said():
    q = torch.randn(1, 2, 6, 8)
    with pytest.raises(RegardError, match="in one piece"):
        regard.attend(q, q, q, "based", mask=Causal() & Segments(), segments=torch.tensor([[0, 0, 1, 1, 0, 0]]))
    with pytest.raises(RegardError, match="segments"):
        regard.attend(q, q, q, "based", mask=Causal() & Segments(), segments=torch.tensor([[0, 0, 1]]))
    with pytest.raises(RegardError, match="segments"):
        regard.attend(q, q, q, "based", mask=Causal() & Segments())
