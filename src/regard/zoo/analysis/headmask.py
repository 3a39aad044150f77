"""HeadMask: some heads are silent in every training batch, at random or the most important ones (id 304; Sun et al., 2020).

out = sum_h xi_h Att_h(x) W_O^h,  xi_h = 0 for n heads of every block in a batch (Mask-Rand: drawn; Mask-Impt: the greatest |dL/dxi_h|), 1 at test time
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.interpret.heads import gated, head_counts
from regard.interpret.tables import HeadTable
from regard.results import Result
from regard.taps import edit
from regard.taps.points import At


@register("headmask", kind="function")
class HeadMask:
    """`with HeadMask(model, n) as mask:` and before every batch `mask.draw()` (mode "rand") or `mask.rank(lambda: loss(batch))` ("impt",
    one more forward and backward pass): n heads of every attention block give zeros for all positions and examples of the batch.

    model: anything that `regard.taps` takes; self-attention and cross-attention alike. where: attention layers ("all", or their numbers).
    rescale: multiply the others by H / (H - n). In evaluation mode nothing changes. masks[layer] (H,) bool: heads that are silent now.
    """

    def __init__(
        self,
        model: nn.Module,
        n: int,
        mode: str = "rand",
        *,
        rescale: bool = False,
        where: str | Iterable[int] = "all",
        seed: int = 0,
    ):
        counts = head_counts(model)
        if mode not in ("rand", "impt"):
            raise RegardError(f"mode={mode!r}; expected rand or impt")
        self.layers = list(range(len(counts))) if where == "all" else [int(at) for at in where]
        if not self.layers or any(not 0 <= at < len(counts) for at in self.layers):
            raise RegardError(f"where={where!r}; expected 'all' or some of 0 .. {len(counts) - 1}")
        if not 0 <= n < min(counts[at] for at in self.layers):
            raise RegardError(f"n={n}; expected 0 or more, and fewer than the {min(counts[at] for at in self.layers)} heads of a block")
        self.model, self.n, self.mode, self.rescale = model, n, mode, rescale
        self.generator = torch.Generator().manual_seed(seed)
        self.masks = {at: torch.zeros(counts[at], dtype=torch.bool) for at in self.layers}
        self.fresh = False
        self.taps: AbstractContextManager[Any] | None = None

    def draw(self) -> None:
        """Choose n heads of every block, without replacement."""
        if self.mode != "rand":
            raise RegardError("draw() chooses at random, and mode='impt' by importance; expected rank(loss)")
        for mask in self.masks.values():
            chosen = torch.randperm(len(mask), generator=self.generator)[: self.n]
            mask.zero_()[chosen] = True
        self.fresh = True

    def rank(self, loss: Callable[[], Tensor]) -> None:
        """Choose the n heads of every block with the greatest |dL/dxi_h|, by a pass of loss() with all heads; no parameter gets a gradient."""
        if self.mode != "impt":
            raise RegardError("rank() chooses by importance, and mode='rand' at random; expected draw()")
        for mask in self.masks.values():
            mask.zero_()
        gates = {at: torch.ones(len(mask), requires_grad=True) for at, mask in self.masks.items()}
        self.fresh = True
        with torch.enable_grad(), gated(self.model, gates):
            slopes = torch.autograd.grad(loss(), list(gates.values()), allow_unused=True)
        for mask, slope in zip(self.masks.values(), slopes, strict=True):
            if slope is not None:
                mask[slope.abs().argsort(descending=True, stable=True)[: self.n]] = True

    def silence(self, x: Tensor, at: At) -> Tensor:
        if not self.model.training or not self.n:
            return x
        if not self.fresh:
            raise RegardError("the model trains and no heads were chosen; expected mask.draw() or mask.rank(loss) before every batch")
        mask = self.masks[at.layer].to(x.device)
        factor = len(mask) / (len(mask) - self.n) if self.rescale and bool(mask.any()) else 1.0
        return torch.where(mask[:, None, None], 0.0, x * factor if factor != 1.0 else x)

    def __enter__(self) -> HeadMask:
        self.taps = edit(self.model, {"heads": self.silence}, layers=self.layers)
        self.taps.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.taps is not None:
            self.taps.__exit__(*error)
        self.taps = None


@dataclass(frozen=True)
class Inequality(Result):
    """How unequal heads are. spread: standard deviation over mean; gini: 0 for equal ones, 1 - 1/n where one has it all; worst: the
    greatest loss of quality that removing one head causes (None where no ablation was given)."""

    spread: float
    gini: float
    worst: float | None


def inequality(importance: HeadTable, ablation: HeadTable | None = None, whole: float | None = None) -> Inequality:
    """importance: of all heads. ablation: quality without each head (`ablation_table`), and `whole`, the quality with all of them."""
    x = importance.scores[~importance.scores.isnan()].double()
    if not len(x) or bool((x < 0).any()) or not bool((x > 0).any()):
        raise RegardError("importance holds negative numbers, or nothing above zero; expected |dL/dxi| of some heads")
    if (ablation is None) != (whole is None):
        raise RegardError("ablation and whole go together; expected the table and the quality with all heads")
    gini = float((x[:, None] - x).abs().sum() / (2 * len(x) ** 2 * x.mean()))
    worst = None if ablation is None or whole is None else whole - float(ablation.scores[~ablation.scores.isnan()].min())
    return Inequality(float(x.std(correction=0) / x.mean()), gini, worst)
