"""Forward and backward over tiles, for every row-local normalizer.

Forward gives, per row, the unnormalised output o = sum w v, the mass t = sum h and the shift c; dividing o by Z(t) is left to
autograd. Backward recomputes each tile and needs only

    ds = dw/ds * gw + dh/ds * gh,   gw = do v^T,   gh = dt,

and for a root shift, by implicit differentiation, ds = dw/ds * (gw - sum(u gw) / sum(u)) with u = dw/dc.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...algebra.normalizer import RowLocal
from ...algebra.part import asks
from ..again import differentiable
from ..layout import Index
from ..pairs import visible
from ..problem import Problem, divisor, reciprocal
from ..reference import Stats, unnormalised
from .root import solve
from .stage import asked, hide, stage_of
from .tiles import Names, Schedule, Span, Tile, fold, unfold

SAFE_EXPONENT = {torch.float32: 40.0, torch.float64: 300.0}


def run(problem: Problem) -> tuple[Tensor, Stats]:
    """(out, stats); differentiable in q, k, v and every input."""
    names = [name for name, x in problem.inputs.items() if x.is_floating_point()]
    o, shift, total, count = Tiled.apply(problem, names, problem.q, problem.k, problem.v, *[problem.inputs[n] for n in names])
    return finish(problem, o, Stats(shift, total, count))


def finish(problem: Problem, o: Tensor, stats: Stats) -> tuple[Tensor, Stats]:
    """Divide the unnormalised output by Z, in the dtype of v; autograd carries the gradient into o, the mass and the inputs."""
    normalizer: Any = problem.mechanism.normalizer
    if stats.shift.requires_grad:  # o and the mass are over e^shift, which moves with the row's extreme
        fade = torch.exp(stats.shift.detach() - stats.shift)
        o, stats = o * fade, Stats(stats.shift, stats.total * fade, stats.visible)
    if normalizer.shift != "root":
        z = divisor(problem, stats.total if normalizer.mass is not None else None, stats.shift)
        if z is not None:
            o = o * reciprocal(z) if o.requires_grad or z.requires_grad else o.mul_(reciprocal(z))
    return o.to(problem.v.dtype), stats


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


def anchored(problem: Problem) -> bool:
    """Whether weights depend on the shift itself by more than rounding, so that gradients pass through the row's extreme score. A position
    that changes scores would stand between the two: its part, as small as `anchor`, is left out."""
    normalizer: Any = problem.mechanism.normalizer
    return (
        normalizer.shift in ("max", "max0")
        and normalizer.anchor > torch.finfo(problem.q.dtype).eps
        and problem.mechanism.score.dot  # type: ignore[union-attr]
        and getattr(problem.mechanism.position, "modify", None) is None
    )


def at_extreme(work: Work, s: Tensor, c: Tensor, hidden: Tensor | None) -> Tensor:
    """Where a tile's scores are their row's largest, up to the rounding of a product formed anew."""
    near = (s >= c - 64 * torch.finfo(s.dtype).eps * (1 + c.abs())) & (c > 0 if work.normalizer.shift == "max0" else True)
    return (near if hidden is None else hide(near, hidden, False)).to(s.dtype)


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


class Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, names: list[str], q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        wide = torch.promote_types(v.dtype, torch.float32)
        counts = None if problem.counts is None else problem.counts.to(wide)
        # Inputs keep their own dtype of at least float32; halves are widened once, so every tile accumulates in float32.
        problem = problem.with_(
            q=q.detach().to(wide),
            k=k.detach().to(wide),
            v=v.detach().to(wide),
            counts=counts,
            inputs={**problem.inputs, **{n: x.detach().to(wide) for n, x in zip(names, inputs, strict=True)}},
        )
        work = Work(problem)
        n, rows = work.q.shape[0], work.q.shape[1]
        o = work.q.new_zeros(n, rows, v.shape[-1])
        total = work.q.new_zeros(n, rows, 1)
        start = float("-inf") if work.shifting else 0.0
        shift = work.q.new_full((n, rows, 1), start)
        count = work.q.new_zeros(n, rows, 1) if problem.want_count else None
        for span in work.schedule.spans():
            for tile in work.schedule.tiles(span):
                forward_tile(work, span, tile, o, total, shift, count)
        shift = torch.where(shift.isfinite(), shift, torch.zeros_like(shift))
        b = problem.sizes.batch
        o, total, shift = (unfold(x, b, work.group) for x in (o, total, shift))
        count = torch.zeros_like(total) if count is None else unfold(count, b, work.group)
        ctx.problem, ctx.names = problem, names
        ctx.save_for_backward(shift, q, k, v, *inputs)
        ctx.anchored = anchored(problem)
        ctx.mark_non_differentiable(*([count] if ctx.anchored else [shift, count]))
        return o, shift, total, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        d_o, d_shift, d_total, _ = grads
        shift, q, k, v, *inputs = ctx.saved_tensors
        problem: Problem = ctx.problem
        if torch.is_grad_enabled():
            return (
                None,
                None,
                *twice(problem, ctx.names, (d_o, d_total, d_shift if ctx.anchored else None), shift.detach(), q, k, v, *inputs),
            )
        wrt = tuple(name for name, x in zip(ctx.names, inputs, strict=True) if x.requires_grad)
        d_inputs: dict[str, Tensor] = {name: torch.zeros_like(problem.inputs[name]) for name in wrt}
        normalizer: Any = problem.mechanism.normalizer
        used = {
            name
            for f in (getattr(problem.mechanism.position, "modify", None), normalizer.weight, normalizer.mass)
            if f
            for name in asks(f, 1)
        } | score_inputs(problem)
        work = Work(problem, tuple(name for name in wrt if name in used - score_inputs(problem)))
        group = work.group
        gh = fold(d_total, group) if normalizer.mass is not None and not work.root else None
        fold_rows = {"do": fold(d_o, group), "shift": fold(shift, group), "gh": gh, "gc": fold(d_shift, group) if ctx.anchored else None}
        dq, dk, dv = (x.new_zeros(x.shape) for x in (work.q, work.k, work.v))  # in one piece, whatever the strides of x
        for span in work.schedule.spans():
            for tile in work.schedule.tiles(span):
                backward_tile(work, span, tile, fold_rows, dq, dk, dv, d_inputs)
        b = problem.sizes.batch
        d_q, d_k, d_v = unfold(dq, b, group), unfold(dk, b, 1), unfold(dv, b, 1)
        extra = [d_inputs[name].to(x.dtype) if name in d_inputs else None for name, x in zip(ctx.names, inputs, strict=True)]
        return None, None, d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), *extra


def twice(
    problem: Problem, names: Sequence[str], grads: tuple[Tensor | None, Tensor | None, Tensor | None], shift: Tensor, *tensors: Tensor
) -> list[Tensor | None]:
    """Gradients of (o, total, shift) with respect to q, k, v and the named inputs, which can be differentiated again."""
    wide = torch.promote_types(tensors[2].dtype, torch.float32)

    def forward(q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = {**problem.inputs, **{name: x.to(wide) for name, x in zip(names, inputs, strict=True)}}
        return unnormalised(problem.with_(q=q.to(wide), k=k.to(wide), v=v.to(wide), inputs=given), shift)

    return differentiable(forward, tensors, grads)


def score_inputs(problem: Problem) -> set[str]:
    """Inputs that the pairing of q and k itself reads."""
    score: Any = problem.mechanism.score
    if score.dot:
        return set()
    declared = {item.name for item in getattr(score, "inputs", ())} | ({"i", "j"} if score.placed else set())
    return declared | set(asks(score.function, 2) if hasattr(score, "function") else ())


def forward_tile(work: Work, span: Span, tile: Tile, o: Tensor, total: Tensor, shift: Tensor, count: Tensor | None) -> None:
    env = work.names.env(span, tile)
    shape = work.shape(span, tile)
    n, rows, group, columns = shape
    k, v = work.columns(work.k, span, tile.columns.index), work.columns(work.v, span, tile.columns.index)
    s = work.stage.scores(work.pair(work.rows(work.q, span, tile), k, span, tile, env).view(shape), env)
    hidden = work.hidden(span, tile)
    if work.root:
        env["c"] = c = solve(work, s, hidden, env)
        work.rows(shift, span, tile).copy_(c.reshape(n, rows * group, 1))
    elif work.shifting:
        env["c"] = raise_shift(work, span, tile, work.shift_of(s, hidden), o, total, shift)
    w, h = work.stage.weights(s, env)
    if hidden is not None:
        hide(w, hidden)
        if h is not None and h is not w:
            hide(h, hidden)
    w = work.weigh_out(tile, w)
    h = h if h is None or h is w else work.weigh_out(tile, h)
    if count is not None:
        seen = torch.full((n, rows, group, 1), float(columns), dtype=s.dtype, device=s.device)
        if hidden is not None:
            seen -= hidden.expand(*shape[:3], hidden.shape[-1]).sum(-1, keepdim=True)
        elif tile.columns.stand_ins and tile.columns.exists is not None:
            seen -= (~tile.columns.exists).sum(-1)[:, None, None, None]
        seen = seen.view(n, rows * group, 1)
        add_rows(count, span, tile, work.group, seen)
    if h is not None and not work.root:
        add_rows(total, span, tile, work.group, h.sum(-1).view(n, rows * group, 1))
    add_rows(o, span, tile, work.group, work.product("out", w.view(n, rows * group, columns), v))


def raise_shift(work: Work, span: Span, tile: Tile, top: Tensor, o: Tensor, total: Tensor, shift: Tensor) -> Tensor:
    """Raise the rows' shift to at least `top` and fade what they have gathered so far; returns the shift, finite."""
    n, rows, group, _ = work.shape(span, tile)
    views = [work.rows(x, span, tile) for x in (o, total, shift)]
    old = views[2].view(n, rows, group, 1)
    new = torch.maximum(old, top)
    c = torch.where(new.isfinite(), new, 0.0)
    fade = torch.exp(torch.where(old == new, 0.0, old - c)).reshape(views[2].shape)
    faded = (views[0].mul_(fade), views[1].mul_(fade), views[2].copy_(new.reshape(views[2].shape)))
    if not isinstance(tile.rows, slice):  # gathered rows are copies: write them back
        for into, value in zip((o, total, shift), faded, strict=True):
            into[span.queries, tile.rows] = value
    return c


def add_rows(into: Tensor, span: Span, tile: Tile, group: int, value: Tensor) -> None:
    """Add a tile's rows to a folded per-query tensor."""
    if isinstance(tile.rows, slice):
        into[span.queries, tile.rows.start * group : tile.rows.stop * group] += value
    else:
        into[span.queries].index_add_(1, tile.rows, value)


def backward_tile(
    work: Work, span: Span, tile: Tile, per_row: dict[str, Any], dq: Tensor, dk: Tensor, dv: Tensor, d_inputs: dict[str, Tensor]
) -> None:
    env = work.names.env(span, tile)
    shape = work.shape(span, tile)
    n, rows, group, columns = shape
    q = work.rows(work.q, span, tile)
    k = work.columns(work.k, span, tile.columns.index)
    do = work.rows(per_row["do"], span, tile)
    if work.root or work.shifting:
        env["c"] = work.rows(per_row["shift"], span, tile).view(n, rows, group, 1)
    hidden = work.hidden(span, tile)
    raw = work.pair(q, k, span, tile, env).view(shape)
    gw = work.product("pulled", do, work.turned_columns("v", work.v, span, tile.columns.index)).view(shape)
    gh = None if per_row["gh"] is None else work.rows(per_row["gh"], span, tile).view(n, rows, group, 1)
    if work.root:
        moved = work.stage.scores(raw.clone(), env)  # the stage may overwrite what it is given
        _, u = work.stage.weight_and_slope(moved, env)
        if hidden is not None:
            u = hide(u.clone(), hidden)
        mass = u.sum(-1, keepdim=True)
        gw -= (u * gw).sum(-1, keepdim=True) * reciprocal(mass)
    extreme = None if per_row["gc"] is None else at_extreme(work, raw, env["c"], hidden)
    w, ds, extra = work.stage.pullback(raw, env, gw, gh, hidden)
    if extreme is not None:
        ds = ds + extreme * work.rows(per_row["gc"], span, tile).view(n, rows, group, 1)
    w, ds, extra = work.weigh_out(tile, w), work.weigh_out(tile, ds), [work.weigh_out(tile, x) for x in extra]
    w, ds = w.reshape(n, rows * group, columns), ds.reshape(n, rows * group, columns)
    for name, grad in zip([name for name in d_inputs if name in stage_names(work)], extra, strict=True):
        work.names.scatter(name, d_inputs[name], grad, span, tile)
    if work.problem.mechanism.score.dot:  # type: ignore[union-attr]
        dq_part, dk_part = work.product("dq", ds, k), work.product("dk", ds.transpose(1, 2), q)
    else:
        dq_part, dk_part = pair_gradients(work, q, k, ds, env, span, tile, d_inputs)
    add_rows(dq, span, tile, group, dq_part)
    add_columns(dk, span, tile, dk_part)
    add_columns(dv, span, tile, work.product("dv", w.transpose(1, 2), do))


def flat_index(span: Span, index: Any, k_len: int) -> Tensor:
    """Rows of all heads' keys laid end to end."""
    return (span.key_heads[:, None] * k_len + index).flatten()  # type: ignore[index]


def add_columns(into: Tensor, span: Span, tile: Tile, value: Tensor) -> None:
    if span.key_heads is not None:
        into.view(-1, into.shape[2]).index_add_(0, flat_index(span, tile.columns.index, into.shape[1]), value.flatten(0, 1))
    elif isinstance(tile.columns.index, slice):
        into[span.keys, tile.columns.index] += value
    else:
        into[span.keys].index_add_(1, tile.columns.index, value)


def stage_names(work: Work) -> set[str]:
    return {getattr(x, "args", [x])[0] if not isinstance(x, str) else x for x in work.stage.wrt}


def pair_gradients(
    work: Work, q: Tensor, k: Tensor, ds: Tensor, env: dict[str, Any], span: Span, tile: Tile, d_inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradient of a score that is not the plain dot product, by autograd on the tile."""
    names = [name for name in d_inputs if name in score_inputs(work.problem)]
    with torch.enable_grad():
        leaves = {name: env[name].detach().requires_grad_() for name in names}
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        s = work.pair(q, k, span, tile, {**env, **leaves})
        dq, dk, *rest = torch.autograd.grad(s, [q, k, *leaves.values()], ds, allow_unused=True)
    for name, grad in zip(names, rest, strict=True):
        if grad is not None:
            work.names.scatter(name, d_inputs[name], grad, span, tile)
    return torch.zeros_like(q) if dq is None else dq, torch.zeros_like(k) if dk is None else dk
