"""Launching the compiled kernels."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...algebra.select import Selection
from ..kernels import Call, sides_of, varying, weigh
from ..layout import layout, static_layout
from ..pairs import visible_counts
from ..problem import Problem
from ..reference import Stats
from ..tiled.run import finish
from . import build
from .generate import Source, generate

CHANNELS = 32  # channels come in multiples of the widest pair of vectors
BLOCK_Q, BLOCK_K = 128, 128
NARROW, WORTH = 0.25, 0.9  # masks that may run in smaller blocks, and how much fewer pairs those must hold
ROWS = 1 << 20  # scores of complete rows that a thread may hold, where roots are looked for
SAFE_EXPONENT = 40.0
SLOTS_BYTES = 1 << 28  # how much memory shares of dk and dv may take

Pointer, Int, Long = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


def up(n: int, step: int) -> int:
    return -(-n // step) * step


@functools.cache
def struct_of(sides: int) -> type[ctypes.Structure]:
    """The Call of template.c for that many side inputs."""
    n = sides + 1
    words = ["q", "k", "v", "grad_out", "grad_total", "kt", "vt", "out", "total", "shift", "dq", "dk", "dv"]
    fields: list[Any] = [(word, Pointer) for word in words]
    fields += [("side", Pointer * n), ("grad_side", Pointer * n)]
    fields += [(word, Long * n) for word in ("side_b", "side_h", "side_q", "grad_slot", "grad_head", "grad_q")]
    fields += [("lists", Pointer), ("lengths", Pointer)]
    fields += [(word, Long) for word in ("list_b", "list_h", "list_q", "length_b", "length_h")]
    fields += [(word, Pointer) for word in ("keep", "kind")] + [(word, Long) for word in ("keep_b", "keep_h", "kind_b", "kind_h")]
    ints = ["batch", "heads", "group", "q_len", "k_len", "k_pad", "d", "dv_size", "bq", "bk", "slots", "threads", "unshifted"]
    fields += [(word, Int) for word in ints] + [("units", Long), ("next", Long), ("failed", Long), ("work", Pointer), ("room", Long)]
    return type("Call", (ctypes.Structure,), {"_fields_": fields})


def stride(x: Tensor, dim: int) -> int:
    return x.stride(dim) if x.shape[dim] > 1 else 0


def room_for(x: Tensor, block: int) -> Tensor:
    """Where the kernel puts x (B, H, L, D) with each block of keys turned."""
    b, h, length, d = x.shape
    return x.new_empty(b, h, up(length, block), d)


class Native:
    """The backend of `kernels.weighted` that runs compiled C."""

    def filled(self, call: Call, q: Tensor, k: Tensor, v: Tensor, blocks: list[Tensor], sides: list[Tensor]) -> Any:
        """The struct of a launch, what does not change between forward and backward."""
        source: Source = call.source
        b, heads, q_len, d = q.shape
        p: Any = struct_of(len(source.sides))()
        p.batch, p.heads, p.group, p.q_len, p.k_len = b, heads, heads // k.shape[1], q_len, k.shape[2]
        p.k_pad, p.d, p.dv_size, p.bq, p.bk = up(k.shape[2], call.block_k), d, v.shape[-1], call.block_q, call.block_k
        p.threads, p.slots = torch.get_num_threads(), 1
        p.q, p.k, p.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        for at, side in enumerate(sides):
            p.side[at] = side.data_ptr()
            p.side_b[at], p.side_h[at], p.side_q[at] = (stride(side, dim) for dim in range(3))
        lists, lengths = keep, kind = blocks
        if lists.dtype == torch.int32:
            p.lists, p.lengths = lists.data_ptr(), lengths.data_ptr()
            p.list_b, p.list_h, p.list_q = stride(lists, 0), stride(lists, 1), lists.stride(2)
            p.length_b, p.length_h = stride(lengths, 0), stride(lengths, 1)
        else:
            p.keep, p.kind = keep.data_ptr(), kind.data_ptr()
            p.keep_b, p.keep_h = stride(keep, 0), stride(keep, 1)
            p.kind_b, p.kind_h = stride(kind, 0), stride(kind, 1)
        return p

    def launch(self, call: Call, word: str, p: Any) -> None:
        if getattr(build.library(call.source.text), word)(ctypes.byref(p)):
            raise MemoryError(f"no memory for the scratch space of {p.threads} threads")

    def forward(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, blocks: list[Tensor], sides: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        b, h, length, _ = q.shape
        out, total, shift = (q.new_empty(b, h, length, d) for d in (v.shape[-1], 1, 1))
        kt = room_for(k, call.block_k)
        p = self.filled(call, q, k, v, blocks, sides)
        p.unshifted = call.source.bounded and float(q.norm(dim=-1).amax() * k.norm(dim=-1).amax()) <= SAFE_EXPONENT
        p.kt, p.out, p.total, p.shift = kt.data_ptr(), out.data_ptr(), total.data_ptr(), shift.data_ptr()
        self.launch(call, "forward", p)
        return out, total, shift

    def backward(
        self, call: Call, do: Tensor, dt: Tensor, shift: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: list[Tensor], sides: list[Tensor]
    ) -> list[Tensor]:
        b, kv_heads, k_len, _ = k.shape
        kt, vt = room_for(k, call.block_k), room_for(v, call.block_k)
        p = self.filled(call, q, k, v, blocks, sides)
        wide = any("k" in varying(sides[at]) for at in call.wrt)
        share = 4 * b * kv_heads * k_len * (q.shape[-1] + v.shape[-1])
        if blocks[0].dtype == torch.int32 and not wide and b * kv_heads % p.threads and b * kv_heads < 4 * p.threads:
            p.slots = max(1, min(p.threads, SLOTS_BYTES // share, -(-q.shape[2] // call.block_q)))
        dq = torch.empty_like(q)
        dk, dv = (x.new_zeros(p.slots, b, kv_heads, p.k_pad, x.shape[-1]) for x in (k, v))
        grads = []
        for at in call.wrt:
            rows, columns = sides[at].shape[2:]
            grad = q.new_zeros(p.slots, b, q.shape[1], rows, columns)
            p.grad_side[at] = grad.data_ptr()
            p.grad_slot[at], p.grad_head[at], p.grad_q[at] = grad.stride(0), grad.stride(2), grad.stride(3) if rows > 1 else 0
            grads.append(grad)
        p.kt, p.vt, p.grad_out, p.grad_total, p.shift = (x.data_ptr() for x in (kt, vt, do, dt, shift))
        p.dq, p.dk, p.dv = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
        self.launch(call, "backward", p)
        extra = [grad.sum(0).sum_to_size(sides[at].shape) for at, grad in zip(call.wrt, grads, strict=True)]
        return [dq, *((x.sum(0) if p.slots > 1 else x[0])[:, :, :k_len].contiguous() for x in (dk, dv)), *extra]


NATIVE = Native()


def takes(problem: Problem) -> bool:
    """Whether a selection's blocks are such as the kernel's tiles can follow; the tiled executor runs the others, and roots over them."""
    selection: Selection | None = problem.selection
    if selection is not None and problem.mechanism.normalizer.shift == "root":  # type: ignore[attr-defined]
        return False
    return selection is None or (selection.block_k % CHANNELS == 0 and (selection.block_q == 1 or selection.block_q % 8 == 0))


def blocks_of(problem: Problem) -> tuple[list[Tensor], int, int]:
    """(lists, block_q, block_k) of a call."""
    sizes, selection, device = problem.sizes, problem.selection, problem.q.device
    if selection is None:
        block_q, block_k = problem.blocks or (BLOCK_Q, BLOCK_K)
        block_q, block_k = min(block_q, up(sizes.q_len, 8)), min(block_k, up(sizes.k_len, CHANNELS))
        if problem.mechanism.normalizer.shift == "root":  # type: ignore[attr-defined]
            block_q = min(block_q, max(8, ROWS // sizes.k_len // 8 * 8))
        if problem.mask.reads:
            return list(layout(problem.mask, sizes, block_q, block_k, problem.inputs, device).lists()), block_q, block_k
        found = static_layout(problem.mask, sizes, block_q, block_k, device)
        if (block_q, block_k) == (BLOCK_Q, BLOCK_K) and found.density < NARROW:  # smaller blocks fit a narrow band closer
            closer = static_layout(problem.mask, sizes, block_q // 2, block_k // 2, device)
            if closer.density < WORTH * found.density:
                return list(closer.lists()), block_q // 2, block_k // 2
        return list(found.lists()), block_q, block_k
    if selection.block_q == 1:
        found = layout(problem.mask, sizes, selection.block_k, selection.block_k, problem.inputs, device)
        return [selection.keep.contiguous(), found.kind.contiguous()], BLOCK_Q, selection.block_k
    block_q = next(size for size in (128, 64, 32, 16, 8) if selection.block_q % size == 0)
    block_k = next(size for size in (128, 64, 32) if selection.block_k % size == 0)
    return list(layout(problem.mask, sizes, block_q, block_k, problem.inputs, device, selection).lists()), block_q, block_k


def run(problem: Problem) -> tuple[Tensor, Stats]:
    """(out, stats) by the compiled kernel; differentiable in q, k, v and the elementwise inputs."""
    sides = sides_of(problem)
    wrt = tuple(sorted(name for name, x in sides.items() if x.requires_grad and torch.is_grad_enabled()))
    source = generate(problem.mechanism, problem.mask, tuple(sorted((name, varying(x)) for name, x in sides.items())), wrt)
    blocks, block_q, block_k = blocks_of(problem)
    names = [name for name, _ in source.sides]
    call = Call(NATIVE, source, block_q, block_k, tuple(names.index(name) for name in source.wrt))
    tensors = [sides[name].float().contiguous() for name in names]
    q, k, v = (pad(x, (0, -x.shape[-1] % CHANNELS)) if x.shape[-1] % CHANNELS else x for x in (problem.q, problem.k, problem.v))
    q, k, v = (x.float().contiguous() for x in (q, k, v))
    out, total, shift = weigh(problem, call, q, k, v, blocks, tensors, names)
    sizes = problem.sizes
    count = torch.zeros_like(total)
    if problem.want_count:
        count = visible_counts(problem.mask, sizes, problem.inputs, q.device).expand_as(total)
    return finish(problem, out[..., : sizes.value_dim], Stats(shift.detach(), total, count))
