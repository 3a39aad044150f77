"""Parts that tokens fall into without being told: prototypes, maps, a mask of what is no background (iFAM's first stage)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import RegardError

DRAWS = ("always", "training")


def gumbel(like: Tensor) -> Tensor:
    return -torch.empty_like(like).exponential_().log()


class Parts(NamedTuple):
    """maps (B, K + 1, h, w), sums over parts 1; mask (B, N) of 0 and 1, with its gradient; soft (B, N): of which the mask is made, the highest
    part; features (B, K + 1, C) normed; logits (B, K, classes); scores (B, K + 1, h, w): l."""

    maps: Tensor
    mask: Tensor
    soft: Tensor
    features: Tensor
    logits: Tensor
    scores: Tensor


class PartDiscovery(nn.Module):
    """Tokens (B, h w, dim) -> `Parts`. noise: the two draws (2, B, K + 1, h, w) in place of Gumbel noise.

    gumbel: whether the maps have noise (the mask has). draws: "always" as released, or "training" alone. dropout, mask_dropout: of whole parts, from
    the classifier and from the mask. thresholds (K,): in evaluation, parts whose x . p is below theirs are not there.
    """

    thresholds: Tensor | None

    def __init__(
        self,
        dim: int,
        parts: int = 8,
        classes: int = 200,
        gumbel: bool = True,
        temperature: float = 1.0,
        dropout: float = 0.3,
        mask_dropout: float = 0.3,
        draws: str = "always",
        thresholds: Tensor | None = None,
    ):
        super().__init__()
        if draws not in DRAWS or parts < 1 or temperature <= 0 or (thresholds is not None and thresholds.shape != (parts,)):
            raise RegardError(
                f"draws={draws!r}, parts={parts}, temperature={temperature}; expected one of {', '.join(map(repr, DRAWS))}, "
                f"positive numbers, and a threshold a part"
            )
        self.dim, self.parts, self.gumbel, self.temperature, self.draws = dim, parts, gumbel, temperature, draws
        self.mask_dropout = mask_dropout
        self.prototypes = nn.Parameter(torch.empty(parts + 1, dim).uniform_(-1, 1) * dim**-0.5)
        self.norm, self.drop = nn.LayerNorm([dim, parts + 1]), nn.Dropout1d(dropout)
        self.head = nn.Linear(dim, classes, bias=False)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        self.register_buffer("thresholds", thresholds)

    def scores(self, x: Tensor) -> Tensor:
        """(B, K + 1, h, w) of x (B, h, w, dim)."""
        alike = torch.einsum("bhwc,kc->bkhw", x, self.prototypes)
        if self.training or self.thresholds is None:
            return 2 * alike - x.square().sum(-1)[:, None] - self.prototypes.square().sum(-1)[:, None, None]
        parts, ground = alike.split([self.parts, 1], 1)
        return torch.cat((parts.masked_fill(parts < self.thresholds[:, None, None], -torch.inf), ground), 1)

    def forward(self, x: Tensor, grid: tuple[int, int], noise: Tensor | None = None) -> Parts:
        if x.dim() != 3 or x.shape[1:] != (grid[0] * grid[1], self.dim):
            raise RegardError(f"x is {tuple(x.shape)}; expected (batch, {grid[0]} x {grid[1]}, dim={self.dim})")
        x = x.unflatten(1, grid)
        scores = self.scores(x)
        if noise is None:
            drawn = self.training or self.draws == "always"
            noise = torch.stack([gumbel(scores) if drawn else torch.zeros_like(scores) for _ in range(2)])
        maps = ((scores + noise[0] * self.gumbel) / self.temperature).softmax(1)
        y = ((scores + noise[1]) / self.temperature).softmax(1)
        shown = F.dropout2d(y[:, :-1], self.mask_dropout, self.training) * (1 - self.mask_dropout if self.training else 1)
        soft, total = shown.amax(1), shown.sum(1)
        mask = (soft >= y[:, -1]).to(y.dtype) + total - total.detach()
        features = self.norm(torch.einsum("bkhw,bhwc->bck", maps, x) / (grid[0] * grid[1])).mT
        logits = self.head(self.drop(features[:, :-1]))
        return Parts(maps, mask.flatten(1), soft.flatten(1), features, logits, scores)

    def without(self, parts: Parts, removed: Sequence[int]) -> Parts:
        """What is left when places of the named parts become background."""
        bad = [part for part in removed if not 0 <= part < self.parts]
        if bad:
            raise RegardError(f"removed={list(removed)}; expected parts from 0 to {self.parts - 1}")
        gone = torch.isin(parts.maps.argmax(1), torch.tensor(list(removed), device=parts.maps.device))
        named = torch.zeros(self.parts, dtype=torch.bool, device=gone.device)
        named[list(removed)] = True
        fore = parts.maps[:, :-1].masked_fill(named[:, None, None], -torch.inf).amax(1)
        mask = ((fore >= parts.maps[:, -1]) & ~gone).to(parts.mask.dtype)
        return parts._replace(mask=mask.flatten(1))
