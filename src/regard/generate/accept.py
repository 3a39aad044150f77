"""Which drafted tokens stay: those the model itself would have chosen, or drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import RegardError
from .tree import Draft

Accepted = tuple[Tensor, Tensor]  # the last node that stays (B,), and the token after it (B,)


class Acceptance(Protocol):
    def __call__(self, draft: Draft, logits: Tensor) -> Accepted:
        """logits (B, n, V) of the model at every node."""


def deepest(draft: Draft, fits: Tensor, prize: Tensor | None = None) -> Tensor:
    """The deepest node (B,) all of whose ancestors fit (B, n); of several the one of the highest prize (B, n), or the first."""
    fits = fits.clone()
    fits[:, 0] = True
    whole = ~(draft.ancestors & ~fits[:, None]).any(-1)
    if draft.live is not None:
        whole &= draft.live
        whole[:, 0] = True
    depth = torch.where(whole, draft.depths.expand_as(whole), -1)
    if prize is None:
        return depth.argmax(-1)
    return torch.where(depth == depth.max(-1, keepdim=True).values, prize, -torch.inf).argmax(-1)


def follow(draft: Draft, chosen: Tensor) -> Accepted:
    """Walk as long as a child is the token chosen (B, n) at its parent."""
    node = deepest(draft, chosen.gather(1, draft.parents.expand_as(draft.tokens)) == draft.tokens)
    return node, chosen.gather(1, node[:, None])[:, 0]


@dataclass(frozen=True)
class Greedy:
    """The most probable token each time; the output is that of plain greedy decoding."""

    def __call__(self, draft: Draft, logits: Tensor) -> Accepted:
        return follow(draft, logits.float().argmax(-1))


@dataclass(frozen=True)
class Sampled:
    """Tokens drawn from softmax(logits / temperature); the output has the distribution of plain sampling.

    Guesses that were not drawn stay where the model draws the same (for them no rule keeps more). Guesses drawn from q stay with
    probability min(1, p / q), children in turn, and what is left of p is max(p - q, 0) each time (Leviathan et al., 2023).
    """

    temperature: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise RegardError(f"temperature={self.temperature}: expected a positive number, or Greedy()")

    def __call__(self, draft: Draft, logits: Tensor) -> Accepted:
        p = (logits.float() / self.temperature).softmax(-1)
        if draft.odds is None:
            drawn = torch.multinomial(p.flatten(0, 1), 1, generator=self.generator).view(p.shape[:2])
            return follow(draft, drawn)
        ends = [self.walk(draft, p[b], b) for b in range(p.shape[0])]
        return torch.stack([node for node, _ in ends]), torch.stack([token for _, token in ends])

    def walk(self, draft: Draft, p: Tensor, b: int) -> tuple[Tensor, Tensor]:
        assert draft.odds is not None
        parents = draft.parents.expand_as(draft.tokens)[b]
        node = 0
        while True:
            left, q = p[node], draft.odds[b, node]
            children = [
                child for child in (parents[1:] == node).nonzero()[:, 0].add(1).tolist() if draft.live is None or draft.live[b, child]
            ]
            for child in children:
                token = draft.tokens[b, child]
                luck = torch.rand((), generator=self.generator, device=p.device)
                if luck * q[token] < left[token]:
                    node = child
                    break
                rest = (left - q).clamp_min(0)
                left = rest / rest.sum() if rest.sum() > 0 else left
            else:
                return torch.tensor(node, device=p.device), torch.multinomial(left, 1, generator=self.generator)[0]


@dataclass(frozen=True)
class Typical:
    """Medusa's typical acceptance (Cai et al., 2024): a guess stays if p > min(eps, delta exp(-H(p))), H = - sum p log(p + 1e-5).

    The longest path stays, of several the most probable; the token after it is the most probable one. Not the distribution of sampling.
    """

    temperature: float = 0.7
    eps: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise RegardError(f"temperature={self.temperature}: expected a positive number")

    def __call__(self, draft: Draft, logits: Tensor) -> Accepted:
        p = (logits.float() / self.temperature).softmax(-1)
        entropy = -(p * (p + 1e-5).log()).sum(-1)
        bar = torch.minimum(torch.full_like(entropy, self.eps), self.delta * torch.exp(-entropy))
        parents = draft.parents.expand_as(draft.tokens)
        own = p.gather(1, parents[..., None].expand_as(p)).gather(2, draft.tokens[..., None])[..., 0]
        score = own.log()
        score[:, 0] = 0
        likely = (draft.ancestors * score.clamp_min(torch.finfo(score.dtype).min / draft.tokens.shape[1])[:, None]).sum(-1)
        node = deepest(draft, own > bar.gather(1, parents), likely)
        return node, logits.gather(1, node[:, None, None].expand(-1, 1, logits.shape[-1]))[:, 0].argmax(-1)
