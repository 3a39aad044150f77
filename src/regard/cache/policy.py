"""What a policy is: it sees every attention call of a model, and says which entries of the cache stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import RegardError
from .layer import KeptLayer, Part
from .session import Session
from .view import View, read


class Policy:
    """Base of all policies. `with policy(model): model.generate(...)`.

    budget: entries a head keeps: a whole number, or a fraction (0, 1] of each row's prompt. decode: whether entries go at every step too, or
    only after the prompt. A subclass says `scores` (what stays is what scores highest), may take `notes` in `observe`, and may change `counts`.
    """

    looks = False  # whether it looks at every step's weights, which are then reckoned once

    def __init__(self, budget: int | float, decode: bool = False):
        fraction = isinstance(budget, float)
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or budget <= 0 or (fraction and budget > 1):
            raise RegardError(f"budget={budget!r}: expected a whole number of at least 1, or a fraction in (0, 1]")
        self.budget, self.decode = budget, decode

    def begin(self, layers: int, heads: int) -> None:
        """A model with so many layers and key heads takes the policy up; RegardError where they do not fit."""

    @property
    def whole_prompts(self) -> bool:
        """Whether prompts are attended as if nothing were ever dropped."""
        return type(self).compute is Policy.compute

    def reading(self, view: View) -> Part:
        """What the call reads of what a part remembers; its new tokens are the last entries."""
        return view.part

    def compute(self, view: View, places: Tensor) -> Tensor:
        """Attention of the call's queries at places (n,): (B, h, group, n, Dv)."""
        if self.looks and self.decode and len(places) == 1 and (type(self).observe is not Policy.observe or not self.roomy(view)):
            return view.look(view.part, places)
        return read(view.query, self.reading(view), places, view.scale, view.window)

    def roomy(self, view: View) -> bool:
        """Whether a step's entries all fit into the budget of every row."""
        if view.first or type(self).counts is not Policy.counts:
            return False
        return view.length <= (self.budget if isinstance(self.budget, int) else int(self.share(view).min()))

    def observe(self, view: View) -> None:
        """See a call, before anything is dropped."""

    def scores(self, view: View) -> Tensor:
        """(B, h, length): the higher, the longer an entry stays; +inf always."""
        raise NotImplementedError

    def counts(self, view: View, scores: Tensor) -> Tensor:
        """(B, h): how many entries stay."""
        return self.share(view)[:, None].expand(-1, len(view.part.heads))

    def share(self, view: View) -> Tensor:
        """The budget of each row (B,), of a fraction at least 1."""
        real = view.memory["prompt"]
        if isinstance(self.budget, float):
            return (real * self.budget).floor().long().clamp_min(1)
        return torch.full_like(real, self.budget)

    def __call__(self, model: nn.Module) -> Session:
        """The policy on a transformers decoder, for a `with` block."""
        return Session(model, self)

    def run(self, layer: KeptLayer, number: int, view: View) -> None:
        """See a call, and drop what does not stay."""
        if view.first:
            view.memory["prompt"] = view.part.alive[:, 0].sum(-1)
        elif not self.decode:
            return
        self.observe(view)
        if self.roomy(view):
            return
        scores = self.scores(view)
        layer.keep(number, self.counts(view, scores), scores)


def newest(view: View, count: Tensor | int) -> Tensor:
    """(B, h, length) bool: the last `count` entries that are alive; count a number, or (B,)."""
    part, limit = view.part, count if isinstance(count, int) else count[:, None, None]
    if part.ordered:
        return part.alive & (part.alive.long().flip(-1).cumsum(-1).flip(-1) <= limit)
    ranked = part.places.masked_fill(~part.alive, -1).sort(dim=2, descending=True).values
    edge = torch.as_tensor(limit, device=ranked.device).clamp(0, view.length)
    last = ranked.gather(2, (edge - 1).clamp_min(0).expand(*ranked.shape[:2], 1))
    return part.alive & (part.places >= last) & (edge > 0)


def oldest(view: View, count: int) -> Tensor:
    """(B, h, length) bool: the tokens of the text's first `count` places behind its padding, as far as they are remembered."""
    return view.part.alive & (view.part.places < begin(view)[:, None, None] + count)


def begin(view: View) -> Tensor:
    """(B,): the place of each row's first token, which is known from the first time on that it is asked for."""
    if "first" not in view.memory:
        view.memory["first"] = torch.where(view.part.alive, view.part.places, torch.iinfo(torch.long).max).amin((1, 2))
    return view.memory["first"]
