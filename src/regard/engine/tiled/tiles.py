"""The order of work: spans of heads, and in each the tiles (rows of queries x columns of keys) that hold visible pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..layout import FULL, PARTIAL, Columns, Index, columns_of, columns_of_heads, layout, static_layout
from ..problem import Problem


@dataclass(frozen=True)
class Tiling:
    """How big tiles are: queries, keys, and scores held at once over all heads of a tile."""

    rows: int = 128
    columns: int = 4096
    elements: int = 1 << 20


@dataclass(eq=False)
class Span:
    """Heads worked on together. Rows of q run over (query, head in group): a tile is (n, rows, G, columns)."""

    queries: slice  # into N = B * Hkv (shared layouts) or B * H
    keys: slice  # into B * Hkv
    group: int
    batch: Tensor  # (n,)
    heads: Tensor  # (n, G)
    blocks: tuple[int, int]  # where to look in the layout
    together: bool = False  # of the column order: the span of all heads
    key_heads: Tensor | None = None  # (n,) of B * Hkv, where heads with blocks of their own are worked on together
    cache: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Tile:
    rows: Index
    row_count: int
    columns: Columns


def fold(x: Tensor, group: int) -> Tensor:
    """(B, Hkv * G, L, D) -> (B * Hkv, L * G, D), so that a tile of queries serves its group with one matrix product."""
    b, h, length, d = x.shape
    if group == 1:
        return x.reshape(b * h, length, d)
    return x.reshape(b * (h // group), group, length, d).transpose(1, 2).reshape(b * (h // group), length * group, d)


def unfold(x: Tensor, batch: int, group: int) -> Tensor:
    n, rows, d = x.shape
    if group == 1:
        return x.reshape(batch, n // batch, rows, d)
    return x.reshape(n, rows // group, group, d).transpose(1, 2).reshape(batch, n // batch * group, rows // group, d)


class Schedule:
    """Everything about which tiles run, decided once a call."""

    def __init__(self, problem: Problem, row_complete: bool):
        sizes, selection = problem.sizes, problem.selection
        self.problem, self.row_complete = problem, row_complete
        self.device = problem.q.device
        self.tiling = problem.tiling or Tiling()
        self.by_columns = selection is not None and selection.block_q < 16 and not row_complete and sizes.q_len >= 16
        block_k = selection.block_k if selection is not None else 128 if sizes.k_len > 128 else max(16, sizes.k_len)
        self.rows = self.tile_rows(sizes.heads // sizes.kv_heads)
        # A tile of rows may not straddle a selection's row blocks more than it must.
        block_q = block_k if self.by_columns else self.rows if selection is None else max(selection.block_q, min(16, sizes.q_len))
        if self.by_columns:
            self.layout = layout(problem.mask, sizes, block_q, block_k, problem.inputs, self.device)
        elif selection is None and not mask_inputs(problem):
            self.layout = static_layout(problem.mask, sizes, block_q, block_k, self.device)
        else:
            self.layout = layout(problem.mask, sizes, block_q, block_k, problem.inputs, self.device, selection)
            if selection is None:
                self.layout = self.layout.joined()
        self.block_q = block_q
        self.own = self.own_blocks() if self.by_columns else frozenset()
        self.shared = self.layout.shared and not self.by_columns
        self.group = sizes.heads // sizes.kv_heads if self.shared else 1
        exact = selection is None or selection.block_q == block_q
        varying = any(x.dim() == 4 and x.shape[3] > 1 for name, x in problem.inputs.items() if name != "visible")
        self.heads_together = not (self.shared or self.by_columns or row_complete or varying) and exact

    def tile_rows(self, group: int) -> int:
        sizes = self.problem.sizes
        rows = max(16, self.tiling.rows // group)
        if self.row_complete and sizes.k_len * rows * group > 4 * self.tiling.elements:
            rows = max(16, 4 * self.tiling.elements // (sizes.k_len * group))
        return rows

    def spans(self) -> Iterator[Span]:
        sizes = self.problem.sizes
        per_kv = sizes.heads // sizes.kv_heads
        if self.by_columns and self.own:
            yield from self.shared_spans(self.block_q, self.block_q, True)
        if self.heads_together:
            yield from self.joint_spans()
            return
        if not self.shared:
            for b in range(sizes.batch):
                for h in range(sizes.heads):
                    at = b * sizes.heads + h
                    kv = b * sizes.kv_heads + h // per_kv
                    where = (b % self.layout.kind.shape[0], h % self.layout.kind.shape[1])
                    yield Span(
                        slice(at, at + 1),
                        slice(kv, kv + 1),
                        1,
                        torch.tensor([b], device=self.device),
                        torch.tensor([[h]], device=self.device),
                        where,
                    )
            return
        columns = sizes.k_len if self.row_complete else min(self.tiling.columns, sizes.k_len)
        yield from self.shared_spans(min(self.rows, sizes.q_len), columns, False)

    def joint_spans(self) -> Iterator[Span]:
        """Heads with blocks of their own, several at once: their keys are gathered to equal lengths."""
        sizes = self.problem.sizes
        columns = max(1, int(min(self.tiling.columns, sizes.k_len) * min(1.0, 1.5 * self.layout.density)))
        room = max(1, self.tiling.elements // (self.block_q * columns))
        for part in torch.arange(sizes.batch * sizes.heads, device=self.device).split(room):
            batch, heads = part // sizes.heads, part % sizes.heads
            kv = batch * sizes.kv_heads + heads // (sizes.heads // sizes.kv_heads)
            here = slice(int(part[0]), int(part[-1]) + 1)
            yield Span(here, here, 1, batch, heads[:, None], (0, 0), key_heads=kv)

    def shared_spans(self, rows: int, columns: int, together: bool) -> Iterator[Span]:
        """Spans of as many heads as a tile has room for."""
        sizes = self.problem.sizes
        per_kv, total = sizes.heads // sizes.kv_heads, sizes.batch * sizes.kv_heads
        room = max(1, min(total, self.tiling.elements // max(1, rows * per_kv * columns)))
        every = torch.arange(total, device=self.device)
        for start in range(0, total, room):
            part = every[start : start + room]
            heads = (part % sizes.kv_heads)[:, None] * per_kv + torch.arange(per_kv, device=self.device)
            here = slice(start, min(start + room, total))
            yield Span(here, here, per_kv, part // sizes.kv_heads, heads, (0, 0), together)

    def tiles(self, span: Span) -> Iterator[Tile]:
        yield from self.column_order(span) if self.by_columns else self.row_order(span)

    def row_order(self, span: Span) -> Iterator[Tile]:
        sizes = self.problem.sizes
        if span.key_heads is not None:
            kind = self.layout.kind[span.batch % self.layout.kind.shape[0], span.heads[:, 0] % self.layout.kind.shape[1]]
            for at in range(kind.shape[1]):
                start, stop = at * self.block_q, min((at + 1) * self.block_q, sizes.q_len)
                for columns in columns_of_heads(kind[:, at], self.layout.block_k, sizes.k_len, self.tiling.columns):
                    yield Tile(slice(start, stop), stop - start, columns)
            return
        blocks = self.layout.rows[span.blocks[0]][span.blocks[1]]
        for at, row in enumerate(blocks):
            start, stop = at * self.block_q, min((at + 1) * self.block_q, sizes.q_len)
            for columns in columns_of(row, self.layout.block_k, sizes.k_len, self.tiling.columns, self.device, self.row_complete):
                yield Tile(slice(start, stop), stop - start, columns)

    def column_order(self, span: Span) -> Iterator[Tile]:
        """One key block at a time, with the queries that chose it: the cheap order when every query chooses for itself."""
        sizes, selection = self.problem.sizes, self.problem.selection
        assert selection is not None
        if span.together:
            for block in self.own:
                at = slice(block * self.block_q, min((block + 1) * self.block_q, sizes.q_len))
                keys = slice(block * selection.block_k, min((block + 1) * selection.block_k, sizes.k_len))
                yield Tile(at, at.stop - at.start, Columns(keys, keys.stop - keys.start, 0))
            return
        b, h = int(span.batch[0]), int(span.heads[0, 0])
        keep = selection.keep[b, h]
        keep = keep.repeat_interleave(selection.block_q, 0)[: sizes.q_len] if selection.block_q > 1 else keep
        chosen = keep.T.nonzero()  # (block, query), in order of block
        if self.own:  # pairs on the diagonal that all heads have worked on together
            own = torch.tensor(sorted(self.own), device=self.device)
            diagonal = chosen[:, 1] // self.block_q == chosen[:, 0]
            chosen = chosen[~(diagonal & torch.isin(chosen[:, 0], own))]
        kind = self.layout.kind[span.blocks][chosen[:, 1] // self.block_q, chosen[:, 0]]
        for wanted in (FULL, PARTIAL):
            pairs = chosen[kind == wanted]
            counts = torch.bincount(pairs[:, 0], minlength=keep.shape[1]).tolist()
            for block, rows in enumerate(pairs[:, 1].split(counts)):
                if not rows.numel():
                    continue
                start, stop = block * selection.block_k, min((block + 1) * selection.block_k, sizes.k_len)
                for part in rows.split(self.tiling.columns):
                    yield Tile(
                        compact(part), part.numel(), Columns(slice(start, stop), stop - start, stop - start if wanted == FULL else 0)
                    )

    def own_blocks(self) -> frozenset[int]:
        """Partial blocks on the diagonal that every query of every head keeps whole: all heads work on them together."""
        sizes, selection = self.problem.sizes, self.problem.selection
        assert selection is not None
        if sizes.heads != sizes.kv_heads or selection.block_q != 1 or sizes.q_len != sizes.k_len or not self.layout.shared:
            return frozenset()
        partial = (self.layout.kind[0, 0] == PARTIAL).nonzero().tolist()
        every = selection.keep.all(0).all(0)  # (query, block)
        return frozenset(j for i, j in partial if i == j and bool(every[i * self.block_q : (i + 1) * self.block_q, j].all()))


def compact(rows: Tensor) -> Index:
    """A slice when the rows are consecutive."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == rows.numel() else rows


def mask_inputs(problem: Problem) -> bool:
    return problem.mask.reads


class Names:
    """The environment of a tile: indices, visible counts and inputs, cut to (n, rows, G, columns) and broadcasting."""

    def __init__(self, problem: Problem, wanted: set[str]):
        self.problem = problem
        self.wanted = wanted
        self.inputs: dict[str, Tensor] = {name: x for name, x in problem.inputs.items() if name in wanted}
        if problem.counts is not None and "n" in wanted:
            self.inputs["n"] = problem.counts.to(problem.q.dtype)
        self.elementwise = {name for name, x in self.inputs.items() if x.dim() == 4} - {
            item.name for item in problem.mechanism.declared if not item.elementwise
        }

    def env(self, span: Span, tile: Tile) -> dict[str, Any]:
        """Only what the mechanism's functions ask for."""
        out: dict[str, Any] = {name: self.cut(name, x, span, tile) if name in self.elementwise else x for name, x in self.inputs.items()}
        if self.wanted & {"b", "h", "i", "j"}:
            out.update(self.places(span, tile))
        return out

    def places(self, span: Span, tile: Tile, skip: int = 0) -> dict[str, Tensor]:
        """b, h, i, j of a tile, its first `skip` columns left out."""
        device, columns = self.problem.q.device, tile.columns
        index = columns.index
        index = slice(index.start + skip, index.stop) if isinstance(index, slice) else index[..., skip:]
        return {
            "b": span.batch[:, None, None, None],
            "h": span.heads[:, None, :, None],
            "i": (at(tile.rows, tile.row_count, device) + self.problem.offset)[:, None, None],
            "j": index[:, None, None] if columns.exists is not None else at(index, columns.count - skip, device),  # type: ignore[index]
        }

    def cut(self, name: str, x: Tensor, span: Span, tile: Tile) -> Tensor:
        per_head = x.shape[2] == 1 and x.shape[3] == 1
        if per_head and name in span.cache:
            return span.cache[name]
        x = x if x.shape[2] == 1 else x[:, :, tile.rows]
        x = x if x.shape[3] == 1 else x[..., tile.columns.index]
        if x.shape[0] > 1 or x.shape[1] > 1:
            nowhere = torch.zeros(1, 1, dtype=torch.long, device=x.device)
            x = x[span.batch[:, None] if x.shape[0] > 1 else nowhere, span.heads if x.shape[1] > 1 else nowhere]
        x = x.transpose(1, 2)
        if per_head:
            span.cache[name] = x
        return x

    def scatter(self, name: str, into: Tensor, grad: Tensor, span: Span, tile: Tile) -> None:
        """Add a tile's gradient of an input to the gradient of the whole."""
        if name not in self.elementwise:
            into += grad
            return
        device = into.device
        grad = grad.transpose(1, 2)  # (n, G, rows, columns)
        axes = [
            (span.batch[:, None, None, None] if into.shape[0] > 1 else None),
            (span.heads[:, :, None, None] if into.shape[1] > 1 else None),
            (at(tile.rows, tile.row_count, device)[:, None] if into.shape[2] > 1 else None),
            (at(tile.columns.index, tile.columns.count, device) if into.shape[3] > 1 else None),
        ]
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        place = [zero if axis is None else axis for axis in axes]
        shape = torch.broadcast_shapes(*[p.shape for p in place])
        index = tuple(p.expand(shape) for p in place)
        into.index_put_(index, grad.sum_to_size(shape), accumulate=True)


def at(index: Index, count: int, device: torch.device) -> Tensor:
    return torch.arange(index.start, index.start + count, device=device) if isinstance(index, slice) else index
