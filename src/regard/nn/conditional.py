"""Parts that spend more or less on a token: a gate that chooses how many, and what such choices cost and how they are spread."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RegardError

ACTS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh, "identity": lambda x: x}


class GumbelGate(nn.Module):
    """x (..., dim) -> one-hot choices (..., choices): of the largest score, in training after Gumbel noise, with the gradients of its softmax.

    hidden, depth: of its linear layers (depth 1: one); act: between them. tau: of the softmax (None: learned, from 1). least: choices below it
    are never made.
    """

    def __init__(
        self, dim: int, choices: int, hidden: int = 128, depth: int = 2, act: str = "identity", tau: float | None = 0.8, least: int = 0
    ):
        super().__init__()
        if act not in ACTS or min(dim, choices, hidden, depth) < 1 or not 0 <= least < choices or (tau is not None and tau <= 0):
            raise RegardError(
                f"act={act!r}, dim={dim}, choices={choices}, hidden={hidden}, depth={depth}, tau={tau}, least={least}: expected one of "
                f"{', '.join(ACTS)}, sizes of at least 1, tau above 0, and least below choices"
            )
        sizes = [dim, *[hidden] * (depth - 1), choices - least]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.act, self.least = act, least
        self.tau = nn.Parameter(torch.ones(())) if tau is None else tau

    def logits(self, x: Tensor) -> Tensor:
        """Scores (..., choices - least)."""
        for number, layer in enumerate(self.layers):
            x = layer(x if number == 0 else ACTS[self.act](x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        scores = self.logits(x)
        if self.training:
            noise = -torch.empty_like(scores).exponential_().log()
            soft = ((scores + noise) / self.tau).softmax(-1)
            hot = F.one_hot(soft.argmax(-1), scores.shape[-1]).to(soft.dtype) - soft.detach() + soft
        else:
            hot = F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)
        return F.pad(hot, (self.least, 0))

    @property
    def flops(self) -> int:
        """Multiplications and additions a token."""
        return sum(2 * layer.in_features * layer.out_features for layer in self.layers)  # type: ignore[operator, misc]


def counts(choice: Tensor) -> Tensor:
    """How many were chosen (...,), of one-hot choices (..., n) of 0 .. n - 1."""
    return (choice * torch.arange(choice.shape[-1], device=choice.device, dtype=choice.dtype)).sum(-1)


def spent(choices: Sequence[Tensor], prices: Sequence[int]) -> Tensor:
    """Cost of what was chosen over that of everything; choices (B, L, n) a part, prices of one unit each."""
    cost = torch.stack([price * counts(choice).mean() for choice, price in zip(choices, prices, strict=True)])
    return cost.sum() / sum(price * (choice.shape[-1] - 1) for choice, price in zip(choices, prices, strict=True))


def variety(choices: Sequence[Tensor]) -> Tensor:
    """Entropy of each part's choices within a sample, over its largest value; mean over samples and parts."""
    found = []
    for choice in choices:
        p = choice.double().sum(1)
        p = p / p.sum(-1, keepdim=True)
        found.append(-(p * (p + 1e-20).log()).sum(-1) / math.log(choice.shape[-1]))
    return torch.stack(found).mean()


def spread(choices: Sequence[Tensor]) -> Tensor:
    """2 mean |c_i - c_j| over pairs of samples, c_i the mean number chosen in a sample over tokens and parts, an n-th of it."""
    cost = torch.stack([counts(choice.double()).mean(1) / choice.shape[-1] for choice in choices]).mean(0)
    return 2 * (cost[:, None] - cost).abs().mean()
