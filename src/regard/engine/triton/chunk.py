"""Chunked recurrences on a GPU: `segment` and `segment_back` as in `engine.recurrent`, over the whole sequence at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..recurrent.backward import decay_back, piece_shape
from ..recurrent.chunk import SAFE, in_chunks, totals
from ..recurrent.pose import Scan
from . import chunk_kernels as kernels
from .run import power_of_two

CHANNELS = 128  # features that fit a program
CHUNK = 32  # tokens: with one stage, the largest kernel then takes 98 KiB of shared memory at 128 features


class Prepared:
    """A scan's tensors as the kernels want them: (B H, N C, .), float32, padded to sizes of whole tiles."""

    def __init__(self, scan: Scan, size: int):
        self.scan, self.size = scan, size
        self.features, self.values = scan.k.shape[-1], scan.v.shape[-1]
        self.f, self.e = power_of_two(self.features), -(-self.values // 16) * 16
        self.q, self.k, self.v = self.rows(scan.q, self.f), self.rows(scan.k, self.f), self.rows(scan.v, self.e)
        self.heads, self.n = self.q.shape[0], self.q.shape[1] // size
        self.beta = None if scan.beta is None else self.rows(scan.beta, 1)
        self.total = totals(scan, size)
        self.kind = 0 if self.total is None else 1 if self.total.shape[-1] == 1 else 2
        self.g: Tensor | None = None
        if self.total is not None:
            full = self.total.expand(*scan.k.shape[:2], self.n, size, -1)
            if self.kind == 2:
                self.kind += int(bool((full[..., -1, :] < -SAFE).any()))
                full = pad(full, (0, self.f - self.features))
            self.g = full.reshape(self.heads, self.n * size, -1).float().contiguous()

    def rows(self, x: Tensor, width: int) -> Tensor:
        x = in_chunks(pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x, self.size)
        return x.reshape(-1, x.shape[-3] * self.size, width).float().contiguous()

    def state(self, x: Tensor) -> Tensor:
        """(B, H, [N,] F, E) padded."""
        return pad(x, (0, self.e - self.values, 0, self.f - self.features)).float().contiguous()

    def like(self, *shape: int) -> Tensor:
        return self.q.new_empty(shape)

    def launch(self, kernel: Any, grid: tuple[int, ...], *tensors: Tensor | None, **flags: bool) -> None:
        values = next(width for width in (32, 16) if self.e % width == 0)
        grid = tuple(self.e // values if size < 0 else size for size in grid)
        given = [self.q if x is None else x for x in tensors]  # a pointer that is never followed
        counted = [self.n] if kernel in (kernels.run_states, kernels.run_states_back) else []
        kernel[grid](*given, *counted, **flags, KIND=self.kind, C=self.size, F=self.f, E=self.e, BV=values, num_stages=1)

    def written(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(u, or with the delta rule U before the state is known; W; T)."""
        if self.beta is None:
            return self.v, None, None
        w, u, t = torch.empty_like(self.k), torch.empty_like(self.v), self.like(self.heads, self.n * self.size, self.size)
        self.launch(kernels.solve_chunks, (self.heads * self.n,), self.q, self.k, self.v, self.g, self.beta, w, u, t)
        return u, w, t

    def outputs(self, x: Tensor, width: int) -> Tensor:
        """Rows back as (B, H, L, width)."""
        return x.view(*self.scan.k.shape[:2], self.n * self.size, -1)[..., : self.scan.length, :width]


def takes(scan: Scan) -> bool:
    """Whether the kernels run a scan: float32 features that fit a program."""
    return scan.lift is None and scan.low is None and scan.k.shape[-1] <= CHANNELS and scan.q.dtype == torch.float32


def segment(scan: Scan, state: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(o, the state after the last token, the states before each chunk)."""
    p = Prepared(scan, size)
    u, w, _ = p.written()
    states, last, out = p.like(*scan.k.shape[:2], p.n, p.f, p.e), torch.empty_like(p.state(state)), torch.empty_like(p.v)
    p.launch(kernels.run_states, (p.heads, -1), p.k, u, p.g, w, p.state(state), states, last, DELTA=w is not None)
    p.launch(kernels.read_chunks, (p.heads * p.n, -1), p.q, p.k, u, p.g, states, out)
    within = (..., slice(p.features), slice(p.values))
    return p.outputs(out, p.values), last[within].contiguous(), states[within]


def segment_back(scan: Scan, states: Tensor, size: int, d_out: Tensor, d_end: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, decay, beta and of the first state."""
    p = Prepared(scan, size)
    do, before = p.rows(d_out, p.e), p.state(states)
    u, w, t = p.written()
    base = slope = d_beta = None
    if w is not None:
        u = u - (w.unflatten(1, (p.n, size)) @ before.view(p.heads, p.n, p.f, p.e)).flatten(1, 2)
        base, slope, d_beta = torch.empty_like(p.v), torch.empty_like(p.k), p.like(p.heads, p.n * size, 1)
        p.launch(kernels.told_back, (p.heads * p.n,), p.q, p.k, p.g, t, do, base, slope)
    after, last = torch.empty_like(before), p.state(d_end)
    first = torch.empty_like(last)
    delta = w is not None
    p.launch(kernels.run_states_back, (p.heads, -1), p.q, p.k, p.g, p.beta, base, slope, do, last, after, first, DELTA=delta)
    dq, dk, dv = (torch.empty_like(x) for x in (p.q, p.k, p.v))
    dg = None if p.g is None else torch.empty_like(p.g)
    tensors = (p.q, p.k, p.v, p.g, p.beta, u, before, after, base, slope, do, dq, dk, dv, dg, d_beta)
    p.launch(kernels.chunks_back, (p.heads * p.n,), *tensors, DELTA=delta)
    d_decay = None
    if dg is not None and scan.decay is not None and p.total is not None:
        d_decay = decay_back(scan, dg.view(*scan.k.shape[:2], p.n, size, -1)[..., : p.total.shape[-1]], size)
        assert d_decay is not None
        d_decay = d_decay.sum_to_size(piece_shape(scan.decay, d_decay))
    grads = p.outputs(dq, p.features), p.outputs(dk, p.features), p.outputs(dv, p.values), d_decay
    return *grads, None if d_beta is None else p.outputs(d_beta, 1), first[..., : p.features, : p.values].contiguous()
