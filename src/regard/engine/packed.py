"""Documents packed into one sequence, for mechanisms with a running state: each document runs by itself, those of one length as a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..algebra.mask import Mask, conjuncts
from ..algebra.mechanism import Mechanism
from ..algebra.part import Input
from ..algebra.token_mask import Segments
from ..errors import RegardError


def is_packed(mask: Mask) -> bool:
    return any(isinstance(part, Segments) for part in conjuncts(mask))


def without_segments(mask: Mask) -> Mask | None:
    rest = [part for part in conjuncts(mask) if not isinstance(part, Segments)]
    joined: Mask | None = rest[0] if rest else None
    for part in rest[1:]:
        assert joined is not None
        joined = joined & part
    return joined


def documents(ids: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of ids (B or 1, L): batch rows (n,) and places (n, length) of the documents of each length."""
    ids = ids.expand(batch, -1)
    change = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
    for row, starts in zip(ids, change, strict=True):
        if int(starts.sum()) != row.unique().numel():
            raise RegardError("input 'segments': an id comes back after another; a running state needs each document in one piece")
    rows, starts = change.nonzero().unbind(1)
    ends = torch.cat((starts[1:], starts.new_zeros(1)))
    lengths = torch.where(ends == 0, ids.shape[1], ends) - starts
    for length in lengths.unique().tolist():
        mine = lengths == length
        yield rows[mine], starts[mine][:, None] + torch.arange(length, device=ids.device)


def picked(x: Any, spec: Input, rows: Tensor, places: Tensor, length: int) -> Any:
    """An input of the documents: its batch and key dimensions, where it has them in full, taken at rows and places."""
    if not isinstance(x, Tensor) or x.dim() != len(spec.shape):
        return x
    b, k = spec.shape.find("b"), spec.shape.find("k")
    wide = k >= 0 and x.shape[k] == length and length > 1
    if b >= 0 and x.shape[b] > 1:
        x = x.index_select(b, rows)
    elif wide and b >= 0:
        x = x.expand(*[len(rows) if dim == b else -1 for dim in range(x.dim())])
    if not wide:
        return x
    if b < 0:
        raise RegardError(f"input {spec.name!r} varies along the keys but not over the batch; expected a batch dimension beside segments")
    x = x.movedim((b, k), (0, 1))
    return x[torch.arange(len(rows), device=x.device)[:, None], places].movedim((0, 1), (b, k))


def run(
    mechanism: Mechanism,
    declared: Mapping[str, Input],
    mask: Mask,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Any],
    attend: Callable[..., Tensor],
) -> Tensor:
    """`attend` of each document under what remains of the mask. Input `segments` (B or 1, L), integers."""
    ids = inputs.get("segments")
    batch, _, length, _ = q.shape
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != length or k.shape[2] != length:
        came = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise RegardError(f"input 'segments' is {came} for {length} queries and {k.shape[2]} keys; expected (B, L) and as many of both")
    rest, other = without_segments(mask), {name: x for name, x in inputs.items() if name != "segments"}
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # (B L, H, D)
    parts, places = [], []
    for rows, at in documents(ids.to(q.device), batch):
        index = (rows[:, None] * length + at).flatten()
        heads = [x[index].unflatten(0, at.shape).transpose(1, 2) for x in flat]
        given = {name: picked(x, declared[name], rows, at, length) if name in declared else x for name, x in other.items()}
        out = attend(*heads, mechanism, mask=rest, **given)
        parts.append(out.transpose(1, 2).flatten(0, 1))
        places.append(index)
    together = torch.cat(parts)[torch.cat(places).argsort()]
    return together.unflatten(0, (batch, length)).transpose(1, 2)
