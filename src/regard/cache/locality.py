"""Heads that read near keys alone for some queries: counts of decisions, and of those that were wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Tally:
    """Of the heads of one layer. local, total (H,): queries that read local keys alone, and all; wrong (2, H): local where the truth was not, and the
    other way round."""

    local: Tensor
    total: Tensor
    wrong: Tensor

    @classmethod
    def empty(cls, heads: int) -> Tally:
        none = torch.zeros(heads, dtype=torch.long)
        return cls(none, none.clone(), none.new_zeros(2, heads))

    def add(self, local: Tensor, truth: Tensor | None, real: Tensor) -> None:
        """local (B, H, n), truth the same or None, real (B, n) bool."""
        shown = real[:, None].cpu()
        here = local.cpu() & shown
        self.local += here.sum((0, 2))
        self.total += shown.expand(*here.shape).sum((0, 2))
        if truth is not None:
            truth = truth.cpu()
            self.wrong += torch.stack(((here & ~truth).sum((0, 2)), (~local.cpu() & truth & shown).sum((0, 2))))


def shares(layers: Mapping[int, Tally]) -> list[Tensor]:
    """(H,) of each layer: the share of queries that read local keys alone."""
    return [layers[at].local.double() / layers[at].total.clamp_min(1) for at in sorted(layers)]


def errors(layers: Mapping[int, Tally]) -> dict[str, float]:
    """Of all decisions: the shares that were local (sparsity), right (agreement), local but should not be (false_local), and the other way round."""
    total = float(sum(t.total.sum() for t in layers.values()))
    local = float(sum(t.local.sum() for t in layers.values())) / total
    wrong = [float(sum(t.wrong[n].sum() for t in layers.values())) / total for n in (0, 1)]
    return {"sparsity": local, "agreement": 1 - sum(wrong), "false_local": wrong[0], "false_full": wrong[1]}
