"""Spans of text that attend within themselves: triangles of local attention, and the best of them without overlap (Tang et al., 2024)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Span = tuple[int, int]  # first and last token
Score = Callable[[Tensor, Tensor, Tensor], Tensor]  # (T, leak, n) -> score


def prefix(a: Tensor) -> Tensor:
    return torch.nn.functional.pad(a, (1, 0, 1, 0)).cumsum(0).cumsum(1)


def triangle_mass(a: Tensor) -> Tensor:
    """T[s, e] for s <= e (0 elsewhere) of causal a (n, n)."""
    p, n = prefix(a.tril()), a.shape[0]
    s, e = torch.arange(n, device=a.device)[:, None], torch.arange(n, device=a.device) + 1
    return (p[e, e] - p[s, e] - p[e, s] + p[s, s]).triu()


def leaks(a: Tensor, rows: int = 8) -> Tensor:
    """leak[s, e]: mean mass that the next min(rows, rest) rows put on columns s .. e; 0 after the last row."""
    p, n = prefix(a), a.shape[0]
    s, e = torch.arange(n, device=a.device)[:, None], torch.arange(n, device=a.device)
    end = (e + 1 + rows).clamp(max=n)
    mass = p[end, e + 1] - p[end, s] - p[e + 1, e + 1] + p[e + 1, s]
    return (mass / (end - e - 1).clamp(min=1)).triu()


def compactness(mass: Tensor, leak: Tensor, size: Tensor, eps: float = 0.004) -> Tensor:
    return mass / size - leak - eps * size


def find_spans(a: Tensor, shortest: int = 4, longest: int = 40, overlap: float = 0.1, score: Score = compactness) -> list[Span]:
    """Spans that tile 0 .. n - 1 of local probabilities a (n, n): best first, none overlapping an earlier one (IoU) more than `overlap`;
    what is left between them are spans too."""
    n = a.shape[0]
    size = torch.arange(n, device=a.device) - torch.arange(n, device=a.device)[:, None] + 1
    values = score(triangle_mass(a), leaks(a), size.clamp(min=1).to(a.dtype))
    s, e = ((size >= shortest) & (size <= longest)).nonzero().unbind(1)
    order = values[s, e].argsort(descending=True, stable=True)
    s, e = s[order], e[order]  # candidates, the best first; one stays possible while it holds free tokens and overlaps no taken span much
    possible, free = torch.ones_like(s, dtype=torch.bool), torch.ones(n, dtype=torch.long, device=a.device)
    taken: list[Span] = []
    while bool(possible.any()):
        at = int(possible.int().argmax())
        inside = free[s[at] : e[at] + 1].nonzero()
        first, last = int(s[at] + inside[0]), int(s[at] + inside[-1])
        taken.append((first, last))
        free[first : last + 1] = 0
        shared = (e.clamp(max=last) - s.clamp(min=first) + 1).clamp(min=0)
        room = torch.nn.functional.pad(free.cumsum(0), (1, 0))
        possible &= (shared <= overlap * (e.clamp(min=last) - s.clamp(max=first) + 1)) & (room[e + 1] > room[s])
    taken.sort()
    tiles, at = [], 0
    for first, last in [*taken, (n, n)]:
        if at < first:
            tiles.append((at, first - 1))
        if first < n:
            tiles.append((first, last))
        at = last + 1
    return tiles
