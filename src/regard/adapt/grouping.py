"""Which of many matrices are alike enough to be one: groups by what merging them costs, and how far to merge where there are many sets."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import RegardError

Groups = tuple[int, ...]  # of each member, the number of its group, in order of first members


def distances(weights: Tensor, gram: Tensor | None = None) -> Tensor:
    """(n, n) squared distances of matrices weights (n, rows, columns): E |(W_i - W_j) x|^2, gram (columns, columns) the mean of x x^T (None: I)."""
    w = weights.double()
    flat = (
        w
        if gram is None
        else w @ torch.linalg.cholesky(gram.double() + 1e-9 * gram.diagonal().mean().double() * torch.eye(len(gram)).to(w))
    )
    return torch.cdist(flat.flatten(1)[None], flat.flatten(1)[None], compute_mode="donot_use_mm_for_euclid_dist")[0].square()


def cost(groups: Sequence[int], d: Tensor) -> float:
    """Sum over groups of the squared distances of members to their group's mean, from pairwise squared distances d."""
    total = 0.0
    for number in set(groups):
        members = [i for i, g in enumerate(groups) if g == number]
        total += float(d[members][:, members].sum()) / (2 * len(members))
    return total


def numbered(groups: Sequence[int]) -> Groups:
    order = list(dict.fromkeys(groups))
    return tuple(order.index(g) for g in groups)


def merges(d: Tensor) -> list[tuple[Groups, float]]:
    """From n groups to one, each time the merge that costs least: (groups, cost), the i-th with n - i groups."""
    groups = list(range(len(d)))
    found = [(numbered(groups), 0.0)]
    while len(set(groups)) > 1:
        pairs = [(a, b) for a in set(groups) for b in set(groups) if a < b]
        tried = [[a if g == b else g for g in groups] for a, b in pairs]
        groups = min(tried, key=lambda one: cost(one, d))
        found.append((numbered(groups), cost(groups, d)))
    return found


def annealed(groups: Groups, d: Tensor, steps: int = 200, heat: float = 0.1, seed: int = 0) -> Groups:
    """Moves of one member to another group, never emptying one: those that cost less are taken, others with probability exp(-rise / temperature),
    from heat times the mean distance down to 0; the best groups met are returned."""
    draw, count = random.Random(seed), len(set(groups))
    now, best = list(groups), list(groups)
    at = least = cost(now, d)
    for step in range(steps if 1 < count < len(groups) else 0):
        temperature = heat * float(d.mean()) * (1 - step / steps)
        i, g = draw.randrange(len(now)), draw.randrange(count)
        if now[i] == g or now.count(now[i]) == 1:
            continue
        tried = [*now[:i], g, *now[i + 1 :]]
        there = cost(tried, d)
        if there < at or (temperature > 0 and draw.random() < 2.718281828 ** (-(there - at) / temperature)):
            now, at = tried, there
            if at < least:
                best, least = list(now), at
    return numbered(best)


def shared_out(sets: Sequence[Tensor], total: int) -> list[int]:
    """How many groups each set of matrices (given by its distances) gets, `total` in all: the merge that raises its own set's cost least, relative
    to the cost of one group, comes first."""
    if not len(sets) <= total <= sum(map(len, sets)):
        raise RegardError(
            f"total={total} groups for {len(sets)} sets of {sum(map(len, sets))} members: expected from one a set to one a member"
        )
    ways = [merges(d) for d in sets]
    counts = [len(d) for d in sets]

    def rise(at: int) -> float:
        now, way = len(sets[at]) - counts[at], ways[at]
        return (way[now + 1][1] - way[now][1]) / (way[-1][1] or 1.0)

    while sum(counts) > total:
        least = min((at for at, count in enumerate(counts) if count > 1), key=rise)
        counts[least] -= 1
    return counts
