"""A choice of blocks beside a mask: what is read is what is chosen and visible, in every executor, whatever the blocks and the mask."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import regard
from regard import Causal, Padding, RegardError, Segments, Sinks, Weighted, Window
from regard.algebra import Chosen, FixedBlock, PerHead, Selection, Strided

SIZES = ((33, 1), (37, 2))  # lengths, and key heads of two query heads


def native_runs(tensors, mask, inputs):
    try:
        regard.plan(*(x.float() for x in tensors), Weighted(select=Chosen()), mask=mask, executor="native", **inputs)
    except RegardError:
        return False
    return True


def softmax_of(q, k, v, seen):
    """float64, whole matrix; rows that see nothing give zeros."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    alive = seen.any(-1, keepdim=True)
    return torch.where(alive, torch.where(alive, s, 0.0).softmax(-1), 0.0) @ v


def near(b, h, i, j):
    return (i - j < 5 + i % 9) & (j <= i)


def masks(length):
    """name -> (mask, inputs, what it shows as a loop would say it: (b, h, i, j) -> bool)."""
    torch.manual_seed(3)
    keep = torch.rand(2, length) < 0.7
    ids = torch.arange(length)[None] * torch.tensor([[3], [4]]) // length
    table = torch.rand(2, 2, length, length) < 0.5
    return {
        "none": (None, {}, lambda b, h, i, j: True),
        "causal": (Causal(), {}, lambda b, h, i, j: j <= i),
        "window": (Causal() & Window(7), {}, lambda b, h, i, j: 0 <= i - j < 7),
        "two sides": (Window(20), {}, lambda b, h, i, j: abs(i - j) < 20),
        "strided": (Causal() & Strided(3), {}, lambda b, h, i, j: j <= i and (i - j) % 3 == 0),
        "sinks": (Causal() & (Window(5) | Sinks(2)), {}, lambda b, h, i, j: j <= i and (i - j < 5 or j < 2)),
        "blocks": (Causal() & FixedBlock(13), {}, lambda b, h, i, j: j <= i and i // 13 == j // 13),
        "padding": (Causal() & Padding(), {"keep": keep}, lambda b, h, i, j: j <= i and bool(keep[b, j])),
        "segments": (Causal() & Segments(), {"segments": ids}, lambda b, h, i, j: j <= i and bool(ids[b, i] == ids[b, j])),
        "function": (near, {}, lambda b, h, i, j: j <= i and i - j < 5 + i % 9),
        "heads": (PerHead((Causal(), Causal() & Window(9))), {}, lambda b, h, i, j: j <= i and (h == 0 or i - j < 9)),
        "table": (table, {}, lambda b, h, i, j: bool(table[b, h, i, j])),
    }


MASKS = list(masks(8))
BLOCKS = [(1, 4), (1, 32), (2, 8), (8, 32), (16, 16), (32, 4), (5, 7)]


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_chosen_and_visible(name, blocks):
    block_q, block_k = blocks
    for length, kv_heads in SIZES:
        mask, inputs, shows = masks(length)[name]
        torch.manual_seed(length)
        keep = torch.rand(2, 2, -(-length // block_q), -(-length // block_k)) < 0.6
        keep[:, :, torch.arange(keep.shape[2]), torch.arange(keep.shape[2]) * block_q // block_k] = True  # as selectors do
        place = torch.arange(length)
        seen = torch.tensor([[[[shows(b, h, i, j) for j in range(length)] for i in range(length)] for h in range(2)] for b in range(2)])
        seen = seen & keep[:, :, place // block_q][..., place // block_k]
        chosen = Weighted(select=Chosen(lambda q, k, view: Selection(keep, block_q, block_k)))
        tensors = [torch.randn(2, h, length, 8, dtype=torch.float64, requires_grad=True) for h in (2, kv_heads, kv_heads)]
        truth = softmax_of(*tensors, seen)
        pull = torch.randn_like(truth)
        wanted = torch.autograd.grad(truth, tensors, pull)
        for executor, dtype in (("tiled", torch.float64), ("reference", torch.float64), ("native", torch.float32), (None, torch.float64)):
            if executor == "native" and not native_runs(tensors, mask, inputs):
                continue
            mine = [x.detach().to(dtype).requires_grad_() for x in tensors]
            out = regard.attend(*mine, chosen, mask=mask, executor=executor, **inputs)
            found = torch.autograd.grad(out, mine, pull.to(dtype))
            for one, other in zip((out, *found), (truth, *wanted), strict=True):
                assert (one.double() - other).abs().max() <= (1e-10 if dtype == torch.float64 else 2e-5), (executor, length, kv_heads)


TRITON = """
import torch, regard
from regard import Causal, Weighted, Window
from regard.algebra import Chosen, Selection
torch.manual_seed(0)
for block_q, block_k, mask in ((1, 16, Causal()), (16, 16, Causal() & Window(40)), (32, 64, None)):
    q, k, v = (torch.randn(1, h, 70, 8, requires_grad=True) for h in (2, 1, 1))
    keep = torch.rand(1, 2, -(-70 // block_q), -(-70 // block_k)) < 0.6
    chosen = Weighted(select=Chosen(lambda q, k, view: Selection(keep, block_q, block_k)))
    found = []
    for executor in ("triton", "reference"):
        out = regard.attend(q, k, v, chosen, mask=mask, executor=executor)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 2e-5, (block_q, block_k, mask)
print("equal")
"""


def test_generated_gpu_kernels():
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    done = subprocess.run([sys.executable, "-c", TRITON], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.parametrize(
    "made",
    [
        lambda: Selection(torch.ones(1, 2, 4, 3, dtype=torch.bool), 4, 4),
        lambda: Selection(torch.ones(1, 2, 4, 4), 4, 4),
        lambda: Selection(torch.ones(4, 4, dtype=torch.bool), 4, 4),
        lambda: Selection(torch.ones(1, 3, 4, 4, dtype=torch.bool), 4, 4),
        lambda: Selection(torch.ones(1, 2, 4, 4, dtype=torch.bool), 0, 4),
    ],
)
def test_selections_that_do_not_fit_are_refused(made):
    q = torch.randn(1, 2, 16, 8)
    with pytest.raises(RegardError, match="selection"):
        regard.attend(q, q, q, Weighted(select=Chosen(lambda q, k, view: made())))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1)])
def test_selections_shared_by_rows_or_heads(shape):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 20, 8, dtype=torch.float64) for _ in range(3))
    keep = torch.rand(*shape, 20, 5) < 0.6
    seen = keep.expand(3, 2, 20, 5).repeat_interleave(4, -1)
    for executor in ("tiled", "reference"):
        out = regard.attend(q, k, v, Weighted(select=Chosen(lambda q, k, view: Selection(keep, 1, 4))), executor=executor)
        assert torch.allclose(out, softmax_of(q, k, v, seen), atol=1e-12)
