"""A scan in chunks: how long they are, where they run, and the way back through them as one function of autograd."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ...errors import MissingDependency
from ..again import differentiable
from .backward import Maybe, piece_shape, segment_back
from .chunk import again, empty_state, segment, segments, tensors
from .pose import Scan


class Chunked(torch.autograd.Function):
    """`chunked` of q, k, v, decay, beta and a first state."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Maybe, beta: Maybe, state: Tensor, size: int) -> tuple[Tensor, Tensor]:
        scan = Scan(q, k, v, decay, beta, True)
        out, end, kept = through(scan, state, size)
        # The first state is the first that is kept, unless a gradient must reach it.
        ctx.save_for_backward(*tensors(scan), state if ctx.needs_input_grad[5] else None, *kept)
        ctx.size = size
        return out, end

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Maybe, ...]:
        q, k, v, decay, beta, first, *kept = ctx.saved_tensors
        scan = Scan(q, k, v, decay, beta, True)
        if torch.is_grad_enabled():
            return (*twice(scan, kept[0].select(-3, 0) if first is None else first, ctx.size, (d_out, d_state)), None)
        device = on_device(scan)
        if device is not None:
            return (*device.segment_back(scan, kept[0], ctx.size, d_out, d_state), None)
        grads: list[Maybe] = [None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format) for x in tensors(scan)]
        stop = scan.length
        for part, states in zip(reversed(segments(scan, ctx.size)), reversed(kept), strict=True):
            start = stop - part.length
            *found, before = segment_back(part, states, ctx.size, d_out[..., start:stop, :], d_state)
            assert before is not None
            d_state = before
            for grad, piece in zip(grads, found, strict=True):
                if grad is not None and piece is not None:
                    (grad if grad.shape[-2] == 1 else grad[..., start:stop, :]).add_(piece.sum_to_size(piece_shape(grad, piece)))
            stop = start
        return (*grads, d_state, None)


def twice(scan: Scan, first: Tensor, size: int, grads: tuple[Tensor, Tensor]) -> list[Maybe]:
    """All gradients, in a form that can be differentiated again: autograd follows the chunks."""

    def forward(q: Tensor, k: Tensor, v: Tensor, decay: Maybe, beta: Maybe, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for part in segments(Scan(q, k, v, decay, beta, True), size):
            out, state, _ = segment(part, state, size)
            outputs.append(out)
        return torch.cat(outputs, -2), state

    return differentiable(forward, (*tensors(scan), first), grads)


def chunk_length(scan: Scan) -> int:
    """Tokens a chunk: longer for scalar decay, where a chunk's inside is one matrix product."""
    device = on_device(scan)
    if device is not None:
        return int(device.CHUNK)
    if scan.beta is not None or scan.low is not None or (scan.decay is not None and scan.decay.shape[-1] > 1):
        return 64
    return 128


def chunked(scan: Scan, state: Tensor | None, size: int | None = None) -> tuple[Tensor, Tensor]:
    """(o, state after the last token), o before the readout."""
    size = min(size or chunk_length(scan), max(1, scan.length))
    size = size if on_device(scan) is None else max(16, 1 << (size - 1).bit_length())
    state = empty_state(scan) if state is None else state
    if (
        scan.lift is None
        and scan.low is None
        and torch.is_grad_enabled()
        and any(x is not None and x.requires_grad for x in (*tensors(scan), state))
    ):
        return Chunked.apply(*tensors(scan), state, size)  # type: ignore[no-any-return, no-untyped-call]
    return through(scan, state, size)[:2]


def through(scan: Scan, state: Tensor, size: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(o, the state after the last token, the states before the chunks of each segment)."""
    device = on_device(scan)
    if device is not None:
        out, state, states = device.segment(scan, state, size)
        return out, state, [states]
    outputs, kept = [], []
    for part in segments(scan, size):
        # Wide features, kept for the way back, would be the largest thing in memory; transitions of low rank have no way back written by hand.
        out, state, states = segment(part, state, size) if scan.lift is None and scan.low is None else again(segment, part, state, size)
        outputs.append(out)
        kept.append(states)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, -2)), state, kept


def on_device(scan: Scan) -> Any:
    """The module whose kernels run a scan where it lies: Triton's on a GPU; None: PyTorch runs it."""
    if scan.q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from ..triton import chunk as device
    except MissingDependency:
        return None
    return device if device.takes(scan) else None
