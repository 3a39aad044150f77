"""What forward and backward over tiles share: folded tensors, the schedule, and how a tile is read and added to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...algebra.normalizer import RowLocal
from ...algebra.part import asks
from ..layout import Index
from ..pairs import visible
from ..problem import Problem
from .stage import asked, stage_of
from .tiles import Names, Schedule, Span, Tile, fold

SAFE_EXPONENT = {torch.float32: 40.0, torch.float64: 300.0}


def no_overflow(problem: Problem, normalizer: RowLocal) -> bool:
    """Whether |q||k| bounds every score so low that exp needs no shift at all: this saves the pass that looks for maxima."""
    if normalizer.shift not in ("max", "max0", "maxabs") or not problem.mechanism.score.dot or problem.mechanism.position is not None:  # type: ignore[union-attr]
        return False
    if normalizer.anchor > torch.finfo(problem.q.dtype).eps:
        return False
    if torch._C._len_torch_dispatch_stack():  # what is recorded must hold for other numbers as well
        return False
    bound = problem.q.norm(dim=-1).amax() * problem.k.norm(dim=-1).amax()
    return bool(bound <= SAFE_EXPONENT[problem.q.dtype])


def score_inputs(problem: Problem) -> set[str]:
    """Inputs that the pairing of q and k itself reads."""
    score: Any = problem.mechanism.score
    if score.dot:
        return set()
    declared = {item.name for item in getattr(score, "inputs", ())} | ({"i", "j"} if score.placed else set())
    return declared | set(asks(score.function, 2) if hasattr(score, "function") else ())


class Work:
    """What forward and backward share: folded tensors, the schedule, and how a tile is read."""

    def __init__(self, problem: Problem, wrt: tuple[str, ...] = ()):
        normalizer = problem.mechanism.normalizer
        assert isinstance(normalizer, RowLocal)
        self.problem, self.normalizer = problem, normalizer
        self.root = normalizer.shift == "root"
        self.schedule = Schedule(problem, self.root)
        mask_names = {item.name for part in problem.mask.parts() for item in getattr(part, "inputs", ())}
        self.mask_inputs = {**{name: problem.inputs[name] for name in mask_names}, "offset": problem.offset, "k_len": problem.sizes.k_len}
        self.names = Names(problem, asked(problem.mechanism) | score_inputs(problem))
        self.scratch: dict[str, Tensor] = {}
        self.group = self.schedule.group
        self.q, self.k, self.v = fold(problem.q, self.group), fold(problem.k, 1), fold(problem.v, 1)
        self.unshifted = no_overflow(problem, normalizer)
        self.shifting = normalizer.shift in ("max", "max0", "maxabs") and not self.unshifted
        self.stage = stage_of(problem.mechanism, wrt, not self.shifting and not self.root)
        self.turned: dict[str, Tensor] = {}
        self.selects = problem.selection is not None and not self.schedule.by_columns and not self.schedule.heads_together
        self.answers: dict[Any, Tensor] = {}

    def rows(self, x: Tensor, span: Span, tile: Tile) -> Tensor:
        """(n, rows * G, d) of a folded per-query tensor: a view when the rows are a slice."""
        if isinstance(tile.rows, slice):
            return x[span.queries, tile.rows.start * self.group : tile.rows.stop * self.group]
        return x[span.queries].index_select(1, tile.rows)

    def columns(self, x: Tensor, span: Span, index: Index) -> Tensor:
        if span.key_heads is not None:
            flat = flat_index(span, index, x.shape[1])
            return x.reshape(-1, x.shape[2]).index_select(0, flat).view(*index.shape, x.shape[2])  # type: ignore[union-attr]
        return x[span.keys, index] if isinstance(index, slice) else x[span.keys].index_select(1, index)

    def shape(self, span: Span, tile: Tile) -> tuple[int, int, int, int]:
        return (span.queries.stop - span.queries.start, tile.row_count, self.group, tile.columns.count)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a b in a buffer of that name, used again by the next tile: fresh pages cost as much as the product."""
        size = a.shape[0] * a.shape[1] * b.shape[2]
        buffer = self.scratch.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self.scratch[name] = a.new_empty(size)
        return torch.bmm(a, b, out=buffer[:size].view(a.shape[0], a.shape[1], b.shape[2]))

    def turned_columns(self, name: str, x: Tensor, span: Span, index: Index) -> Tensor:
        """(n, d, columns) of a key tensor turned once a call, which matrix products read fastest."""
        if not isinstance(index, slice):
            return self.columns(x, span, index).transpose(1, 2)  # rows gather fast, columns do not
        if self.problem.sizes.q_len < 4096:  # turning costs more than it saves
            return x[span.keys, index].transpose(1, 2)
        if name not in self.turned:
            self.turned[name] = x.transpose(1, 2).contiguous()
        return self.turned[name][span.keys, :, index]

    def pair(self, q: Tensor, k: Tensor, span: Span, tile: Tile, env: dict[str, Any]) -> Tensor:
        """Raw scores (n, rows * G, columns)."""
        score: Any = self.problem.mechanism.score
        if score.dot:
            return self.product("scores", q, self.turned_columns("k", self.k, span, tile.columns.index))
        n, rows, group = q.shape[0], q.shape[1] // self.group, self.group
        parted = q.view(n, rows, group, -1).transpose(1, 2)
        places = {"h": span.heads[:, :, None, None]} | ({"i": env["i"].reshape(-1, 1)} if "i" in env else {})
        s = score.pair(parted, k[:, None], {**env, **places})
        return s.transpose(1, 2).reshape(n, rows * group, -1)  # type: ignore[no-any-return]

    def hidden(self, span: Span, tile: Tile) -> Tensor | None:
        """Where the pairs of the tile's last columns are masked, or None when all of the tile is visible."""
        skip = tile.columns.full
        if skip == tile.columns.count or tile.columns.stand_ins:
            return None
        key = None
        if self.problem.mask.relative and isinstance(tile.rows, slice) and isinstance(tile.columns.index, slice):
            key = (tile.rows.start - tile.columns.index.start - skip, tile.row_count, tile.columns.count - skip)
            if key in self.answers and not self.selects:
                return self.answers[key]
        at = self.names.places(span, tile, skip)
        hidden = ~visible(self.problem.mask, at["b"], at["h"], at["i"], at["j"], self.mask_inputs)
        selection = self.problem.selection
        if self.selects and selection is not None:
            b, h = int(span.batch[0]), int(span.heads[0, 0])
            keep = selection.keep[b % selection.keep.shape[0], h % selection.keep.shape[1]]
            chosen = keep[(at["i"].flatten() - self.problem.offset) // selection.block_q][:, at["j"] // selection.block_k]
            hidden = hidden | ~chosen[None, :, None, :]
        elif tile.columns.exists is not None:
            hidden = hidden | ~tile.columns.exists[:, None, None, skip:]
        elif key is not None and len(self.answers) < 64:
            self.answers[key] = hidden
        return hidden

    def weigh_out(self, tile: Tile, x: Tensor) -> Tensor:
        """Weigh stand-ins for missing keys 0; they are copies of visible keys, so x is finite there."""
        if tile.columns.stand_ins and tile.columns.exists is not None and tile.columns.full < tile.columns.count:
            x[..., tile.columns.full :].mul_(tile.columns.exists[:, None, None, tile.columns.full :].to(x.dtype))
        return x

    def shift_of(self, s: Tensor, hidden: Tensor | None) -> Tensor:
        s = s.abs() if self.normalizer.shift == "maxabs" else s
        full = s.shape[-1] - (0 if hidden is None else hidden.shape[-1])
        top = s[..., :full].amax(-1, keepdim=True) if full else torch.full_like(s[..., :1], float("-inf"))
        if hidden is not None:
            top = torch.maximum(top, s[..., full:].masked_fill(hidden, float("-inf")).amax(-1, keepdim=True))
        top = top.clamp_min(0) if self.normalizer.shift == "max0" else top
        return top


def flat_index(span: Span, index: Any, k_len: int) -> Tensor:
    """Rows of all heads' keys laid end to end."""
    return (span.key_heads[:, None] * k_len + index).flatten()  # type: ignore[index]


def add_rows(into: Tensor, span: Span, tile: Tile, group: int, value: Tensor) -> None:
    """Add a tile's rows to a folded per-query tensor."""
    if isinstance(tile.rows, slice):
        into[span.queries, tile.rows.start * group : tile.rows.stop * group] += value
    else:
        into[span.queries].index_add_(1, tile.rows, value)


def add_columns(into: Tensor, span: Span, tile: Tile, value: Tensor) -> None:
    if span.key_heads is not None:
        into.view(-1, into.shape[2]).index_add_(0, flat_index(span, tile.columns.index, into.shape[1]), value.flatten(0, 1))
    elif isinstance(tile.columns.index, slice):
        into[span.keys, tile.columns.index] += value
    else:
        into[span.keys].index_add_(1, tile.columns.index, value)
