"""Streams in pieces, values and gradients side by side, floating-point operations."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.algebra import Mechanism
from regard.engine import step
from regard.lab import naive

F64 = torch.float64


def streamed(mechanism: str | Mechanism, q: Tensor, k: Tensor, v: Tensor, cuts: tuple[int, ...] = (1, 2, 30), **inputs: Tensor) -> Tensor:
    """The outputs of a stream that takes tokens in pieces ending at `cuts` and at the end; inputs with a length are cut along."""
    edges, state, outs = [0, *cuts, q.shape[2]], None, []
    for a, b in itertools.pairwise(edges):
        part = {name: x[:, :, a:b] if x.dim() > 2 else x for name, x in inputs.items()}
        out, state = step(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], mechanism, state, **part)
        outs.append(out)
    return torch.cat(outs, 2)


def gradients(out: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    return torch.autograd.grad((out * seed).sum(), leaves)


def gap_with_gradients(found: Tensor, truth: Tensor, leaves: tuple[Tensor, ...]) -> float:
    pairs = zip(gradients(found, leaves), gradients(truth, leaves), strict=True)
    return max(naive.gap(found, truth), *[naive.gap(a, b) for a, b in pairs])


def flops(run: Callable[[], object]) -> int:
    """Multiplications and additions of the matrix products in a run: a count, the same on every machine."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
