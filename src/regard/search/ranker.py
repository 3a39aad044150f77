"""Which of two architectures is better: learned from pairs, as only the order counts in a search."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PairwiseRanker(nn.Module):
    """f(features): logistic loss on f(a) - f(b) against which of a, b is better. interactions: products of two features count too.

    keep: share of features that stay, those of the largest weight after a first fit (the others are dropped before the second).
    """

    def __init__(self, width: int, interactions: bool = True, keep: float = 1.0):
        super().__init__()
        self.interactions, self.keep = interactions, keep
        pairs = torch.combinations(torch.arange(width), with_replacement=False) if interactions else torch.zeros(0, 2, dtype=torch.long)
        self.pairs: Tensor
        self.register_buffer("pairs", pairs)
        self.kept: Tensor
        self.register_buffer("kept", torch.ones(width + len(pairs)))
        self.weight = nn.Parameter(torch.zeros(width + len(pairs)))

    def expanded(self, features: Tensor) -> Tensor:
        return torch.cat((features, features[..., self.pairs[:, 0]] * features[..., self.pairs[:, 1]]), -1) * self.kept

    def forward(self, features: Tensor) -> Tensor:
        return self.expanded(features) @ self.weight

    def fit(self, features: Tensor, pairs: Sequence[tuple[int, int]], steps: int = 300, decay: float = 1e-3) -> None:
        """features (n, width); pairs (better, worse) of their rows."""
        index = torch.tensor(pairs)
        for _ in range(2 if self.keep < 1 else 1):
            self.fit_once(features, index, steps, decay)
            if self.keep < 1:
                impact = (self.weight * self.expanded(features).std(0)).abs()
                self.kept.copy_((impact >= impact.quantile(1 - self.keep)).float())

    def fit_once(self, features: Tensor, pairs: Tensor, steps: int, decay: float) -> None:
        optimizer = torch.optim.LBFGS([self.weight], max_iter=steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            scores = self(features)
            value = F.softplus(scores[pairs[:, 1]] - scores[pairs[:, 0]]).mean() + decay * self.weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]
