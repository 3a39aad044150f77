"""Each row of a padded batch, and each packed document, run as if alone.

What chooses keys by blocks, ranks or places counts them from the first token of a sequence: beside padding or other documents the choice
would be another one. Sequences are read out of the mask; each runs by itself under what remains of it. Queries at padding give zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algebra.mask import Either, Full, Mask, Where, Without, conjuncts
from ..algebra.mechanism import Clustered, Mechanism, Program, Weighted
from ..algebra.part import Input, Sizes
from ..algebra.position_mask import BlockPowers, Causal, Columns, FixedBlock, Sinks
from ..algebra.token_mask import Explicit, Padding, Segments
from ..errors import RegardError
from .pairs import indices, visible
from .problem import fill_inputs, sizes_of
from .reference import Stats

PLACED = (BlockPowers, Columns, FixedBlock, Sinks)  # masks that count from the first token
TOLD = (Padding, Segments)  # masks that say at once where sequences are
Span = tuple[int, int]


@dataclass(frozen=True)
class Group:
    """Batch rows whose sequences lie in the same places: queries [q0, q1), keys [k0, k1)."""

    rows: tuple[int, ...]
    queries: Span
    keys: Span


def counts_places(mechanism: Mechanism) -> bool:
    """Whether what a mechanism reads depends on where its sequence starts."""
    if isinstance(mechanism, Weighted):
        chooses = mechanism.select is not None and mechanism.select.alone
        return chooses or any(isinstance(part, PLACED) for part in mechanism.mask.parts())  # type: ignore[union-attr]
    return isinstance(mechanism, (Program, Clustered))


def may_divide(mask: Mask) -> bool:
    """Whether a call's mask can tell sequences apart: it reads tensors, or is a function."""
    return any(isinstance(part, (*TOLD, Explicit, Where)) for part in mask.parts())


def groups(mechanism: Mechanism, mask: Mask, sizes: Sizes, inputs: Mapping[str, Tensor], device: torch.device) -> list[Group] | None:
    """The sequences of a call, those in the same places together; None: it is one sequence a row, or nothing that a mask tells."""
    told = [part for part in conjuncts(mask) if isinstance(part, TOLD)]
    found: list[list[tuple[Span, Span]]] | None
    if told:
        found = told_spans(told, sizes, inputs, mask.causal or mechanism.causal_only)
    elif any(isinstance(part, (Explicit, Where, Either, Without)) for part in conjuncts(mask)):
        found = seen_spans(table_of(mask, sizes, inputs, device))
    else:
        return None
    if found is None:
        return None
    rows: dict[tuple[Span, Span], list[int]] = {}
    for row, spans in enumerate(found * (sizes.batch if len(found) == 1 else 1)):
        for span in spans:
            rows.setdefault(span, []).append(row)
    made = [Group(tuple(rows), queries, keys) for (queries, keys), rows in rows.items()]
    whole = Group(tuple(range(sizes.batch)), (0, sizes.q_len), (0, sizes.k_len))
    return None if made == [whole] and not told else made


def table_of(mask: Mask, sizes: Sizes, inputs: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """(B, H or 1, Lq, Lk): what a mask shows."""
    at = indices(sizes, device)
    seen = visible(mask, at["b"], at["h"], at["i"], at["j"], {**inputs, "offset": sizes.k_len - sizes.q_len, "k_len": sizes.k_len})
    return seen[(None,) * (4 - seen.dim())].expand(sizes.batch, -1, sizes.q_len, sizes.k_len)


def runs(label: Tensor) -> list[tuple[int, int, int]]:
    """(label, start, stop) of each stretch of equal labels (L,)."""
    starts = [0, *((label[1:] != label[:-1]).nonzero().flatten() + 1).tolist()]
    return [(int(label[a]), a, b) for a, b in zip(starts, [*starts[1:], len(label)], strict=True)] if len(label) else []


def told_spans(told: Sequence[Mask], sizes: Sizes, inputs: Mapping[str, Tensor], causal: bool) -> list[list[tuple[Span, Span]]]:
    """A row's sequences from `keep` and `segments`; queries stand at the end of the keys, unless they are others' (no causality)."""
    real = torch.ones(1, sizes.k_len, dtype=torch.bool)
    ids = torch.zeros(1, sizes.k_len, dtype=torch.long)
    for part in told:
        if isinstance(part, Padding):
            keep = part.in_sight(inputs).cpu()
            real = real & keep
        else:
            given = inputs["segments"]
            ids = (given.flatten(0, -2) if given.dim() > 2 else given).cpu()
    others = not causal and not any(isinstance(part, Segments) for part in told) and sizes.q_len != sizes.k_len
    label = torch.where(real, torch.unique(ids, return_inverse=True)[1], -1).expand(max(len(real), len(ids)), sizes.k_len)
    found = []
    for row in label:
        spans = [(number, start, stop) for number, start, stop in runs(row) if number >= 0]
        if len({number for number, _, _ in spans}) < len(spans):
            raise RegardError(
                "a sequence with gaps: an id of input 'segments' comes back after another, or input 'keep' hides tokens between others; "
                "this mechanism chooses by places in a sequence: expected each in one piece"
            )
        found.append([pair for _, start, stop in spans for pair in placed(start, stop, sizes, others)])
    return found


def placed(start: int, stop: int, sizes: Sizes, others: bool) -> list[tuple[Span, Span]]:
    """The queries that belong to keys [start, stop)."""
    offset = sizes.k_len - sizes.q_len
    if others:
        return [((0, sizes.q_len), (start, stop))]
    if sizes.q_len == 1:  # a token of a stream stands at the end of what it may read
        return [((0, 1), (start, stop))] if stop == sizes.k_len or start == 0 or stop > offset else []
    queries = max(0, start - offset), max(0, stop - offset)
    return [(queries, (start, stop))] if queries[1] > queries[0] else []


def seen_spans(table: Tensor) -> list[list[tuple[Span, Span]]] | None:
    """A row's sequences from the pairs (B, H, Lq, Lk) that a mask shows: sets of tokens without a visible pair between them.

    None where tokens are hidden inside a sequence: what hides them is then no padding.
    """
    seen = table.any(1).cpu()
    q_len, k_len = seen.shape[-2:]
    offset, place = k_len - q_len, torch.arange(k_len)
    found: list[list[tuple[Span, Span]]] = []
    for pairs in seen:
        real = pairs.any(0)
        one = runs(real.long())
        shown = [(a, b) for number, a, b in one if number]
        if q_len == 1 or (q_len != k_len and bool((pairs == pairs[:1]).all())):  # every query reads the same keys
            if len(shown) > 1:
                return None
            found.append([((0, q_len), span) for span in shown])
            continue
        if offset < 0:
            return None
        own = real[offset:]
        if bool((own & ~pairs.diagonal(offset)).any()):
            return None
        first = torch.where(pairs, place, k_len).amin(-1)[own]
        last = torch.where(pairs, place, -1).amax(-1)[own]
        cover = torch.zeros(k_len + 1, dtype=torch.long)
        cover.index_add_(0, first + 1, torch.ones_like(first)).index_add_(0, last + 1, -torch.ones_like(last))
        label = torch.where(real, (cover[:k_len].cumsum(0) == 0).long().cumsum(0), -1)
        spans = [(number, a, b) for number, a, b in runs(label) if number >= 0]
        if len({number for number, _, _ in spans}) < len(spans):
            return None
        found.append([((max(0, a - offset), b - offset), (a, b)) for _, a, b in spans if b > offset])
    return found


def remaining(mask: Mask, sizes: Sizes, inputs: Mapping[str, Tensor], group: Group, device: torch.device) -> tuple[Mask, dict[str, Tensor]]:
    """What a mask still says inside a group: masks of i - j as they are, the others as a table of pairs."""
    left: Mask = Full()
    rest: Mask = Full()
    for part in conjuncts(mask):
        if part.relative and not part.reads:
            left = left & part
        elif not isinstance(part, (*TOLD, Full)):
            rest = rest & part
    if isinstance(rest, Full):
        return left, {}
    (q0, q1), (k0, k1) = group.queries, group.keys
    at = indices(sizes, device)
    b = torch.tensor(group.rows, device=device)[:, None, None, None]
    around = {**inputs, "offset": sizes.k_len - sizes.q_len, "k_len": sizes.k_len}
    table = visible(rest, b, at["h"], at["i"][q0:q1], at["j"][k0:k1], around)
    table = table[(None,) * (4 - table.dim())].expand(len(group.rows), -1, q1 - q0, k1 - k0)
    order = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=device).tril(k1 - k0 - (q1 - q0))
    if bool((table | ~order).all()) and not bool((table & ~order).any()):
        return left if left.causal else left & Causal(), {}
    return (left, {}) if bool(table.all()) else (left & Explicit(), {"visible": table})


def part_of(x: Any, spec: Input | None, group: Group, sizes: Sizes) -> Any:
    """An input's share of a group: its batch rows, its queries and its keys."""
    if not isinstance(x, Tensor) or spec is None or x.dim() != len(spec.shape):
        return x
    if "b" in spec.shape and "f" in spec.shape:
        raise RegardError(
            f"input {spec.name!r} describes whole rows; it cannot be told which part of it belongs to a padded or packed sequence: "
            "expected one call a sequence"
        )
    for dim, letter in enumerate(spec.shape):
        if x.shape[dim] == 1:
            continue
        if letter == "b":
            x = x.index_select(dim, torch.tensor(group.rows, device=x.device))
        elif letter in "qk":
            start, stop = group.queries if letter == "q" else group.keys
            whole = sizes.q_len if letter == "q" else sizes.k_len
            x = x.narrow(dim, start, stop - start) if x.shape[dim] == whole else x
    return x


def run(
    mechanism: Mechanism,
    declared: Mapping[str, Input],
    mask: Mask,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Any],
    attend: Callable[..., tuple[Tensor, Stats | None]],
) -> tuple[Tensor, Stats | None] | None:
    """(out, row statistics or None) of a call whose mask divides it into sequences; None where it does not."""
    sizes = sizes_of(q, k, v)
    of_mask = {item.name: item for part in mask.parts() for item in getattr(part, "inputs", ())}
    known = fill_inputs(of_mask, inputs, sizes, q)
    found = groups(mechanism, mask, sizes, known, q.device)
    if found is None:
        return None
    out, sums = q.new_zeros(*q.shape[:3], v.shape[-1]), [q.new_zeros(*q.shape[:3], 1) for _ in range(3)]
    stats: Stats | None = None
    rest = {name: x for name, x in inputs.items() if name not in of_mask}
    for group in found:
        rows = torch.tensor(group.rows, device=q.device)
        queries, keys = slice(*group.queries), slice(*group.keys)
        mine = {name: part_of(x, declared.get(name), group, sizes) for name, x in rest.items()}
        left, tables = remaining(mask, sizes, known, group, q.device)
        part, stats = attend(q[rows, :, queries], k[rows, :, keys], v[rows, :, keys], mechanism, mask=left, **mine, **tables)
        out[rows, :, queries] = part.to(out.dtype)
        if stats is not None:
            for into, x in zip(sums, stats, strict=True):
                into[rows, :, queries] = x.to(into.dtype)
    return out, None if stats is None and found else Stats(*sums)
