"""Attention that knows the layers of a frozen model: what one layer finds, another may read. `regard.adapt.patch` runs it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..algebra.mechanism import Weighted
from ..algebra.position import Rope
from ..algebra.position_mask import Causal
from . import meter
from .door import attend

Heads = tuple[Tensor, Tensor, Tensor]


class Policy:
    """Base: whole prompts without padding, layer after layer from 0. rotated: whether q and k come with the model's rotary positions."""

    rotated = True
    rope = Rope()  # the model's; a patch sets it

    def calibrate(self, layers: Sequence[Heads]) -> None:
        """Learn what must be known of a model beforehand from q, k, v (B, H or Hkv, L, D) of its layers on one prompt."""

    def prompt(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, L, D), k, v (B, Hkv, L, D) of a layer -> (B, H, L, Dv); scores are scaled by D^-1/2."""
        raise NotImplementedError

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal softmax of the last queries over all keys, rotated first where that is still to be done."""
        return attend(q, k, v, Weighted(mask=Causal(), position=None if self.rotated else self.rope))

    @staticmethod
    def count(seen: Tensor, heads: int = 1) -> None:
        """Tell `pairs_read` of pairs read outside `attend`: a bool tensor of them, or one for so many heads."""
        if meter.counting():
            meter.add(int(seen.sum()) * heads)


class Recorded(Policy):
    """Softmax that keeps what every layer was given."""

    def __init__(self) -> None:
        self.layers: list[Heads] = []

    def prompt(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.layers.append((q, k, v))
        return self.dense(q, k, v)
