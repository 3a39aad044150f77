"""Graphs around a centre as text: distances in hops, graphs with their classes, and graphs that are changed on purpose."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import RegardError

FAR = torch.iinfo(torch.int64).max


def hop_distance(edges: Tensor, count: int) -> Tensor:
    """edges (E, 2) of node numbers, either way -> hops between nodes (count, count); FAR where there is no path."""
    if edges.dim() != 2 or edges.shape[1] != 2 or bool(((edges < 0) | (edges >= count)).any()):
        raise RegardError(f"edges {tuple(edges.shape)}; expected (E, 2) with node numbers from 0 to {count - 1}")
    step = torch.eye(count, device=edges.device)
    step[edges[:, 0], edges[:, 1]] = step[edges[:, 1], edges[:, 0]] = 1
    reach = torch.eye(count, device=edges.device)
    found = torch.full((count, count), FAR, device=edges.device)
    for hops in range(count):
        found = torch.where((reach > 0) & (found == FAR), hops, found)
        reach = ((reach @ step) > 0).float()
    return found


def perturb(
    edges: Tensor, tokens: Tensor, kind: str, generator: torch.Generator, *, share: float = 0.5, pool: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(edges, tokens) (E, 2), (n,) of an ego graph whose centre is the last node, changed: "swap" the subtrees of two neighbours, "second": second
    hops shuffled among neighbours, "across": a neighbour and a second hop exchanged, "replace": a `share` of the others' tokens drawn from `pool`,
    "shuffle": all others' tokens permuted."""
    n = len(tokens)
    hops, out, named = hop_distance(edges, n)[-1], edges.clone(), tokens.clone()
    first, second = ((hops == r).nonzero().flatten() for r in (1, 2))
    first, second = (x[torch.randperm(len(x), generator=generator)] for x in (first, second))
    if kind not in ("swap", "second", "across", "replace", "shuffle") or (kind == "replace" and pool is None):
        raise RegardError(f"kind={kind!r}, pool={pool}; expected swap, second, across, shuffle, or replace with a pool of tokens")
    if (kind == "swap" and len(first) < 2) or (kind in ("second", "across") and not len(second)):
        raise RegardError(f"{len(first)} neighbours, {len(second)} second hops: too few to {kind!r}")
    if kind in ("swap", "across"):
        rename = torch.arange(n)
        a, b = (first[0], first[1]) if kind == "swap" else (first[0], second[0])
        rename[a], rename[b] = b, a
        held = (edges == n - 1).any(1) if kind == "swap" else torch.zeros(len(edges), dtype=torch.bool)
        out = torch.where(held[:, None], edges, rename[edges])
    elif kind == "second":
        down = ((hops[edges] == torch.tensor([1, 2])).all(1) | (hops[edges] == torch.tensor([2, 1])).all(1)).nonzero().flatten()
        ends = edges[down][hops[edges[down]] == 2]
        flipped = hops[edges[down, 0]] == 2
        out[down, (~flipped).long()] = ends[torch.randperm(len(ends), generator=generator)]
    else:
        others = torch.randperm(n - 1, generator=generator)
        if kind == "replace" and pool is not None:
            gone = others[: round(share * (n - 1))]
            named[gone] = pool[torch.randint(len(pool), (len(gone),), generator=generator)]
        else:
            named[: n - 1] = tokens[others]
    return out, named


def ego_graphs(count: int, generator: torch.Generator, first: int = 5, second: int = 5, classes: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """(edges (B, E, 2), ids (B, T), labels (B,)): trees around the last node, others in any order; ids: an instruction, a class a node, the centre
    and a question; the label is the class most of the `first` neighbours have (the least of equals)."""
    n = first + second
    order = torch.rand(count, n, generator=generator).argsort(1)
    up = torch.cat(
        (torch.full((count, first), n), order[:, :first].gather(1, torch.randint(first, (count, second), generator=generator))), 1
    )
    kind = torch.randint(classes, (count, n), generator=generator)
    labels = nn.functional.one_hot(kind.gather(1, order[:, :first]), classes).sum(1).argmax(1)
    fixed = torch.tensor([classes, classes + 1, classes + 2]).expand(count, 3)
    return torch.stack((up, order), -1), torch.cat((fixed[:, :1], kind, fixed[:, 1:]), 1), labels
