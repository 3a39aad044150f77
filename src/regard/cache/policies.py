"""Policies that every user compares with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RegardError
from .policy import Policy, newest, oldest
from .view import View


class Full(Policy):
    """Everything stays."""

    def __init__(self) -> None:
        super().__init__(1.0)

    def run(self, layer: Any, number: int, view: View) -> None:
        pass


class Random(Policy):
    """Entries stay by lot, the newest one always: the control of all policies."""

    def __init__(self, budget: int | float, decode: bool = False, generator: torch.Generator | None = None):
        super().__init__(budget, decode)
        self.generator = generator

    def scores(self, view: View) -> Tensor:
        lots = torch.rand(view.part.alive.shape, generator=self.generator).to(view.query.device)
        return lots.masked_fill(newest(view, 1), torch.inf)


class StreamingLLM(Policy):
    """The first `sinks` tokens and the newest ones (Xiao et al., 2023), at every step."""

    def __init__(self, budget: int | float, sinks: int = 4, decode: bool = True):
        super().__init__(budget, decode)
        if sinks < 0:
            raise RegardError(f"sinks={sinks}: expected 0 or more")
        self.sinks = sinks

    def scores(self, view: View) -> Tensor:
        return view.part.places.float().masked_fill(oldest(view, self.sinks), torch.inf)


class H2O(Policy):
    """Heavy hitters (Zhang et al., 2023): most attention received so far, summed over all queries and the heads of a group; half of the
    budget, rounded down, is the newest tokens."""

    looks = True

    def __init__(self, budget: int | float, decode: bool = True):
        super().__init__(budget, decode)

    def observe(self, view: View) -> None:
        note(view, "mass", view.mass())

    def scores(self, view: View) -> Tensor:
        mass: Tensor = view.part.notes["mass"]
        return mass.masked_fill(newest(view, self.share(view) // 2), torch.inf)


class SnapKV(Policy):
    """Attention of the prompt's last `window` queries, their mean, smoothed over neighbours (Li et al., 2024); the window stays."""

    def __init__(self, budget: int | float, window: int = 32, kernel: int = 5, pooling: str = "avg"):
        super().__init__(budget)
        if window < 1 or kernel < 1 or kernel % 2 == 0 or pooling not in ("avg", "max"):
            raise RegardError(f"window={window}, kernel={kernel}, pooling={pooling!r}: expected positive, odd, and 'avg' or 'max'")
        self.window, self.kernel, self.pooling = window, kernel, pooling

    def scores(self, view: View) -> Tensor:
        seen = view.length - min(self.window, view.length)
        mass = torch.cat([p.sum(3) for p, _ in view.rows(self.window)]).view(-1, *view.query.shape[:3], view.length).sum(0)[..., :seen]
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        if seen:
            mass = pool(mass.flatten(0, 1), self.kernel, 1, self.kernel // 2).view_as(mass)
        return F.pad(mass.mean(2), (0, view.length - seen), value=torch.inf)


class TOVA(Policy):
    """Attention of the newest query, the mean over all heads, at every step (Oren et al., 2024): all heads keep the same tokens."""

    looks = True

    def __init__(self, budget: int | float, decode: bool = True):
        super().__init__(budget, decode)

    def scores(self, view: View) -> Tensor:
        p = next(view.rows(1))[0]
        return p.mean((1, 2, 3), keepdim=False)[:, None].expand(-1, p.shape[1], -1)


class KeyNorm(Policy):
    """Keys of small norm stay (Devoto et al., 2024), the newest one always."""

    def scores(self, view: View) -> Tensor:
        return (-view.part.keys.float().norm(dim=-1)).masked_fill(newest(view, 1), torch.inf)


class Wrapped(Policy):
    """A policy that takes another one's scores, and changes how much stays or what does."""

    def __init__(self, base: Policy):
        super().__init__(base.budget, base.decode)
        if type(base).run is not Policy.run:
            raise RegardError(f"base {type(base).__name__}: expected a policy that says by scores what stays, such as SnapKV")
        self.base = base

    @property
    def whole_prompts(self) -> bool:
        return self.base.whole_prompts

    def begin(self, layers: int, heads: int) -> None:
        self.base.begin(layers, heads)

    def compute(self, view: View, places: Tensor) -> Tensor:
        return self.base.compute(view, places)

    def observe(self, view: View) -> None:
        self.base.observe(view)

    def scores(self, view: View) -> Tensor:
        return self.base.scores(view)

    def counts(self, view: View, scores: Tensor) -> Tensor:
        return self.base.counts(view, scores)


class Pyramid(Wrapped):
    """Budgets that fall evenly from the first layer to the last (PyramidKV; Cai et al., 2024), of r = budget - window of the base (0 without one):

    window + r // beta in the last layer, window + 2 r - r // beta in the first, or all of a prompt that is shorter, and the last layer gets what is
    left; steps between layers are rounded down. Prompts shorter than 2 r keep the budget in all layers.
    """

    def __init__(self, base: Policy, beta: float = 20.0):
        super().__init__(base)
        if beta < 1:
            raise RegardError(f"beta={beta}: expected 1 or more")
        self.beta = beta

    def counts(self, view: View, scores: Tensor) -> Tensor:
        own, length = self.base.counts(view, scores), view.memory["prompt"][:, None]
        window = int(getattr(self.base, "window", 0))
        rest = (own - window).clamp_min(0)
        low = (rest / self.beta).floor().long()
        high = torch.minimum(2 * rest - low, length - window)
        low = torch.where(high == length - window, 2 * rest - high, low)
        found = high - (high - low) // max(1, view.layers - 1) * view.layer + window
        return torch.where((length < 2 * rest) | (view.layers == 1), own, found)


class Ada(Wrapped):
    """Budgets of heads by where the scores are (Ada-KV; Feng et al., 2024): a layer's entries are chosen together, after every head has
    its best `safeguard` share of the budget."""

    def __init__(self, base: Policy, safeguard: float = 0.2):
        super().__init__(base)
        if base.decode or not 0 <= safeguard <= 1:
            raise RegardError(
                f"safeguard={safeguard}, base.decode={base.decode}: expected 0 to 1, and a base that drops after the prompt alone"
            )
        self.safeguard = safeguard

    def counts(self, view: View, scores: Tensor) -> Tensor:
        own = self.base.counts(view, scores)
        sure = (own * self.safeguard).long()
        alive = view.part.alive.sum(2)
        rank = scores.masked_fill(~view.part.alive, -torch.inf).argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        lifted = scores.masked_fill(rank < sure[..., None], torch.inf).masked_fill(~view.part.alive, -torch.inf)
        found = torch.zeros_like(own)
        for row in range(len(own)):
            total = min(int(own[row].sum()), int(alive[row].sum()))
            chosen = lifted[row].flatten().argsort(dim=0, descending=True, stable=True)[:total]
            found[row] = torch.bincount(chosen // view.length, minlength=own.shape[1])
        return found


class Planned(Policy):
    """A policy a layer, by number; layers without one keep everything."""

    def __init__(self, plan: dict[int, Policy] | Sequence[Policy | None]):
        super().__init__(1.0)
        self.plan = plan if isinstance(plan, dict) else {at: one for at, one in enumerate(plan) if one is not None}

    @property
    def whole_prompts(self) -> bool:
        return all(one.whole_prompts for one in self.plan.values())

    def begin(self, layers: int, heads: int) -> None:
        wrong = [at for at in self.plan if not 0 <= at < layers]
        if wrong:
            raise RegardError(f"plan names layers {wrong}; expected 0 to {layers - 1}")
        for one in self.plan.values():
            one.begin(layers, heads)

    def compute(self, view: View, places: Tensor) -> Tensor:
        own = self.plan.get(view.layer)
        return super().compute(view, places) if own is None else own.compute(view, places)

    def run(self, layer: Any, number: int, view: View) -> None:
        if view.layer in self.plan:
            self.plan[view.layer].run(layer, number, view)


def note(view: View, name: str, more: Any) -> None:
    """Add to what is known of every entry."""
    notes = view.part.notes
    notes[name] = more if name not in notes else notes[name] + more
