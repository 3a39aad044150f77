"""Log-linear attention: a state for each span of a Fenwick tree. Matrix form, chunks in O(L log L), and steps with O(log L) states.

For a delta rule, what a span gives is its part of the rule's implied weights; the transitions of later tokens act on every span's state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...algebra.mask import Full, Mask
from ...algebra.position_mask import Causal
from ...algebra.states import LogLinear
from ...errors import RegardError
from ..problem import check_names
from .chunk import cut, within, wy
from .parallel import delta_weights, pair_weights, running
from .pose import Scan, declared_of, pose

SIZE = 64


@dataclass
class LevelState:
    """The states alive, one a level (None: empty), level 0 being the newest token alone; length: tokens read."""

    levels: tuple[Tensor | None, ...]
    length: int

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.levels if x is not None)


def level_of(t: Tensor, j: Tensor) -> Tensor:
    """bit_length(t xor j)."""
    apart = t ^ j
    # frexp's exponent of an integer is its bit length, and that of 0 is 0.
    return torch.frexp(apart.to(torch.float64)).exponent.long()


def levels_needed(length: int) -> int:
    return (length - 1).bit_length() + 1


def prepared(
    mechanism: LogLinear, mask: Mask, q: Tensor, k: Tensor, v: Tensor, scale: float | None, given: Mapping[str, Any], first: int
) -> tuple[Scan, Tensor]:
    if not isinstance(mask, (Full, Causal)):
        raise RegardError(f"mask={mask!r}: spans are counted from the first token, padding included; expected Causal() or no mask")
    declared = {**declared_of(mechanism.inner), **{item.name: item for item in mechanism.inputs}}
    check_names(given, declared, mechanism)
    scales = given.get("level_scales")
    needed = levels_needed(first + k.shape[-2])
    if scales is None or scales.dim() != 4 or scales.shape[-2] not in (1, k.shape[-2]) or scales.shape[-1] < needed:
        got = None if scales is None else tuple(scales.shape)
        raise RegardError(f"input 'level_scales': expected (B, H, {k.shape[-2]}, levels) with at least {needed} levels, got {got}")
    inner = {name: x for name, x in given.items() if name != "level_scales"}
    scan = pose(mechanism.inner, mask, q, k, v, scale, inner, first=first)
    return scan, scales.to(scan.q.dtype).expand(*scan.q.shape[:2], k.shape[-2], -1)


def run(
    mechanism: LogLinear,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float | None,
    given: Mapping[str, Any],
    attend: Callable[..., Tensor],
) -> Tensor:
    scan, scales = prepared(mechanism, mask, q, k, v, scale, given, 0)
    return chunked(scan, scales)[0][..., -q.shape[-2] :, :].to(v.dtype)


def step(
    mechanism: LogLinear,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LevelState | None,
    mask: Mask,
    scale: float | None,
    given: Mapping[str, Any],
) -> tuple[Tensor, LevelState]:
    first = 0 if state is None else state.length
    scan, scales = prepared(mechanism, mask, q, k, v, scale, given, first)
    if first == 0 and scan.length > 1:  # a prompt: whole chunks at once, then the tokens that fill no chunk
        whole = scan.length // SIZE * SIZE
        out, levels = chunked(cut(scan, 0, whole), scales[..., :whole, :]) if whole else (scan.v[..., :0, :], ())
        rest, levels = stepped(cut(scan, whole, scan.length), scales[..., whole:, :], levels, whole)
        return torch.cat((out, rest), -2).to(v.dtype), LevelState(levels, scan.length)
    out, levels = stepped(scan, scales, () if state is None else state.levels, first)
    return out.to(v.dtype), LevelState(levels, first + scan.length)


def parallel(scan: Scan, scales: Tensor) -> Tensor:
    """o by the whole matrix of weights."""
    t = torch.arange(scan.length, device=scan.q.device)
    w = pair_weights(scan) if scan.beta is None else delta_weights(scan)
    level = level_of(t[:, None], t).clamp_max(scales.shape[-1] - 1).expand_as(w)
    return (w * scales.gather(-1, level)) @ scan.v


def merged(levels: tuple[Tensor | None, ...], t: int) -> tuple[Tensor | None, ...]:
    """Before token (or chunk) t > 0: all states up to t's lowest set bit become one, a level above it."""
    lowest = (t & -t).bit_length() - 1
    young = [x for x in levels[: lowest + 1] if x is not None]
    older = levels[lowest + 2 :]
    return (*(None,) * (lowest + 1), torch.stack(young).sum(0) if young else None, *older)


def stepped(scan: Scan, scales: Tensor, levels: tuple[Tensor | None, ...], first: int) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Token by token, as written."""
    outs = []
    for n in range(scan.length):
        t = first + n
        k, v, q = (x[..., n, :] for x in (scan.k, scan.v, scan.q))
        fade = None if scan.decay is None else torch.exp(scan.decay[..., 0 if scan.decay.shape[-2] == 1 else n, :]).unsqueeze(-1)
        beta = None if scan.beta is None else scan.beta[..., n, :].unsqueeze(-1)
        moved: list[Tensor | None] = []
        for x in merged(levels, t) if t else ():
            if x is not None:
                x = x if fade is None else x * fade
                x = x if beta is None else x - beta * k.unsqueeze(-1) * (k.unsqueeze(-2) @ x)
            moved.append(x)
        write = k.unsqueeze(-1) * v.unsqueeze(-2)
        levels = (write if beta is None else beta * write, *moved[1:])
        out = [scales[..., n, at, None] * (q.unsqueeze(-2) @ x).squeeze(-2) for at, x in enumerate(levels) if x is not None]
        outs.append(torch.stack(out).sum(0))
    return (torch.stack(outs, -2) if outs else scan.v[..., :0, :]), levels


def chunked(scan: Scan, scales: Tensor, size: int = SIZE) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """(o, the states alive after the last token): levels inside a chunk by its matrix, older ones by states of whole chunks.

    size: a power of two. The states are those of `stepped` where the length fills whole chunks.
    """
    length, small = scan.length, size.bit_length() - 1
    levels: tuple[Tensor | None, ...] = ()
    outs = []
    t = torch.arange(size, device=scan.q.device)
    level = level_of(t[:, None], t)
    for n, start in enumerate(range(0, length, size)):
        part = cut(scan, start, min(start + size, length))
        mine, count = scales[..., start : start + size, :], part.length
        levels = merged(levels, n) if n else levels
        total = None if part.decay is None else running(part.decay, count)
        inside, into, out_of, fade = within(part.q, part.k, total)

        inside = inside.tril()
        if part.beta is None:
            weights, solved, reads = inside, part.v, None
        else:
            weights = delta_weights(part)
            reads, solved = wy(part.k, part.v, part.beta, total)
        near = level[:count, :count].clamp_max(scales.shape[-1] - 1).expand_as(weights)
        out = (weights * mine.gather(-1, near)) @ part.v
        moved: list[Tensor | None] = []
        for at, x in enumerate(levels):
            if x is None:
                moved.append(None)
                continue
            # Chunk level `at` of chunk n is token level at + log2(size); level 0 there is the chunk's own.
            taken = None if reads is None else reads @ x
            read = into @ x if taken is None else into @ x - inside @ taken
            out = out + mine[..., at + small, None] * read
            x = x if fade is None else x * fade
            moved.append(x if taken is None else x - out_of.transpose(-1, -2) @ taken)
        levels = (out_of.transpose(-1, -2) @ solved, *moved[1:])
        outs.append(out)
    finer: tuple[Tensor | None, ...] = (None,) * small
    # After whole chunks the newest chunk's own state stands for the levels of its tokens: the next merge puts them together anyway.
    return torch.cat(outs, -2), (levels[0], *finer, *levels[1:]) if levels else ()
