"""How many query-key pairs calls really read: a count kept while it is asked for, whatever the mechanism is made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .pairs import indices, visible
from .problem import Problem

ROWS = 512  # query rows whose pairs are counted at a time


@dataclass
class Pairs:
    """read: pairs whose scores entered an output, over batch and heads; a program may read a pair twice, it then counts twice."""

    read: int = 0


_open: list[Pairs] = []


@contextmanager
def pairs_read() -> Iterator[Pairs]:
    """Count the pairs that every weighted call inside the `with` block reads; counting costs about as much as dense attention."""
    found = Pairs()
    _open.append(found)
    try:
        yield found
    finally:
        _open.remove(found)


def counting() -> bool:
    return bool(_open)


def add(count: int) -> None:
    """Pairs read outside of `attend`."""
    for one in _open:
        one.read += count


def add_problem(problem: Problem) -> None:
    sizes, chosen = problem.sizes, problem.selection
    at = indices(sizes, problem.q.device)
    env: dict[str, Any] = {**problem.inputs, "offset": problem.offset, "k_len": sizes.k_len}
    total = 0
    for start in range(0, sizes.q_len, ROWS):
        i = at["i"][start : start + ROWS]
        seen = visible(problem.mask, at["b"], at["h"], i, at["j"], env)
        seen = seen[(None,) * (4 - seen.dim())]
        if chosen is not None:
            rows = torch.arange(start, start + len(i), device=i.device) // chosen.block_q
            kept = chosen.keep[..., rows, :].repeat_interleave(chosen.block_k, -1)[..., : sizes.k_len]
            seen = seen & kept
        n_b, n_h = seen.shape[:2]
        total += int(seen.expand(n_b, n_h, len(i), sizes.k_len).sum()) * (sizes.batch // n_b) * (sizes.heads // n_h)
    add(total)
