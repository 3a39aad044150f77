"""Sets of unequal size whose answers are exact: their maximum, how many kinds they hold, their clusters, the one that does not belong."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import RegardError


class Sets(NamedTuple):
    """x (B, n, features), keep (B, n) bool: which items exist, answer (B, ...)."""

    x: Tensor
    keep: Tensor
    answer: Tensor


def sized(count: int, generator: torch.Generator, least: int, most: int) -> Tensor:
    """keep (count, most): the first `least` to `most` items of each set, equally likely."""
    if not 1 <= least <= most:
        raise RegardError(f"least={least}, most={most}; expected 1 <= least <= most")
    return torch.arange(most) < torch.randint(least, most + 1, (count, 1), generator=generator)


def maxima(count: int, generator: torch.Generator, least: int = 1, most: int = 10, top: float = 100.0) -> Sets:
    """Numbers from 0 to `top`, (count, most, 1), and the largest of those that exist, (count,)."""
    keep = sized(count, generator, least, most)
    x = top * torch.rand(count, most, 1, generator=generator)
    return Sets(x * keep[..., None], keep, x[..., 0].masked_fill(~keep, -math.inf).amax(1))


def looks(kinds: int, features: int) -> Tensor:
    """What each kind looks like, (kinds, features), the same in every batch."""
    return torch.randn(kinds, features, generator=torch.Generator().manual_seed(kinds))


def unique_items(
    count: int, generator: torch.Generator, least: int = 6, most: int = 10, kinds: int = 10, features: int = 16, noise: float = 0.3
) -> Sets:
    """Items of a few kinds, under noise, and how many different kinds there are, (count,)."""
    keep = sized(count, generator, least, most)
    few = torch.randint(1, kinds + 1, (count, 1), generator=generator)  # so that every answer is about as likely
    kind = (torch.rand(count, most, generator=generator) * few).long()
    kind = torch.rand(count, kinds, generator=generator).argsort(1).gather(1, kind)
    x = looks(kinds, features)[kind] + noise * torch.randn(count, most, features, generator=generator)
    there = torch.zeros(count, kinds).scatter_reduce(1, kind, keep.float(), "amax")
    return Sets(x * keep[..., None], keep, there.sum(1).long())


def odd_one(
    count: int, generator: torch.Generator, least: int = 5, most: int = 8, kinds: int = 20, features: int = 16, noise: float = 0.5
) -> Sets:
    """Items all of one kind but one, under noise; the kinds are new in every set. answer (count,): the number of the other one."""
    keep = sized(count, generator, max(least, 3), most)
    own, other = torch.rand(count, kinds, generator=generator).argsort(1)[:, :2].unbind(1)
    at = (torch.rand(count, generator=generator) * keep.sum(1)).long()
    kind = torch.where(torch.arange(most) == at[:, None], other[:, None], own[:, None])
    x = looks(kinds, features)[kind] + noise * torch.randn(count, most, features, generator=generator)
    return Sets(x * keep[..., None], keep, at)


def clusters(
    count: int, generator: torch.Generator, least: int = 50, most: int = 100, groups: int = 4, spread: float = 0.3, reach: float = 4.0
) -> Sets:
    """Points of a mixture of Gaussians of deviation `spread`, whose centres are uniform within `reach` of zero and whose shares are any: x (count,
    most, 2). answer (count, groups, 2): the centres."""
    keep = sized(count, generator, least, most)
    centres = reach * (2 * torch.rand(count, groups, 2, generator=generator) - 1)
    shares = (
        -torch.rand(count, groups, generator=generator).clamp_min(1e-9).log()
    )  # exponential, and so uniform on the simplex over their sum
    which = torch.multinomial(shares, most, replacement=True, generator=generator)
    x = centres.gather(1, which[..., None].expand(-1, -1, 2)) + spread * torch.randn(count, most, 2, generator=generator)
    return Sets(x * keep[..., None], keep, centres)


def mixture_log_likelihood(x: Tensor, keep: Tensor, told: Tensor) -> Tensor:
    """Mean over items that exist of log sum_k w_k N(x; m_k, s_k^2), (B,): told (B, groups, 5) holds log shares before the softmax, m and log s of two
    axes, as a net gives them."""
    shares, middle, size = told[..., 0].log_softmax(1), told[..., 1:3], told[..., 3:5]
    gap = (x[:, :, None] - middle[:, None]) / size.exp()[:, None]
    each = shares[:, None] - gap.square().sum(-1) / 2 - size.sum(-1)[:, None] - math.log(2 * math.pi)
    return (each.logsumexp(2) * keep).sum(1) / keep.sum(1)
