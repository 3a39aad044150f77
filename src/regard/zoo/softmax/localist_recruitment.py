"""Recruitment: blocks, and whole experts, are added when they shorten the description of the data (id 300; Diederich, 2025).

    J = sum_data -log2 p(x | blocks) + sum_b C(b),   C(b) = (k_b / 2) log2 N + log2(number of blocks),   all in bits
A block is an isotropic Gaussian around its anchor; a candidate splits a block in two; it is recruited iff it saves more than it costs.

Not built: recruited language models beyond bigrams.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.plots import figure


@dataclass(frozen=True)
class Decision:
    """One considered change: what ("recruit", "prune"), of which block, its gain in bits of data and cost in bits of blocks, and J after it."""

    what: str
    block: int
    gain: float
    cost: float
    length: float
    accepted: bool


@dataclass
class Recruitment:
    """means (blocks, D): their normalised rows are the blocks' anchors. labels (N,): each token's block. trace: all decisions."""

    means: Tensor
    labels: Tensor
    length: float
    trace: list[Decision] = field(default_factory=list)

    @property
    def anchors(self) -> Tensor:
        return torch.nn.functional.normalize(self.means, dim=-1)

    def plot(self) -> str:
        """The description length after each accepted decision as an SVG."""
        points = [(float(n), decision.length) for n, decision in enumerate(self.accepted)]
        return figure("Description length", "accepted decision", "bits", {"J": points})

    @property
    def accepted(self) -> list[Decision]:
        return [one for one in self.trace if one.accepted]


def block_cost(tokens: int, blocks: int, parameters: int) -> float:
    """C(b) = (k / 2) log2 N + log2 B bits."""
    return parameters / 2 * math.log2(max(2, tokens)) + math.log2(max(1, blocks))


def coded(x: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """(bits of each token, its block): nearest block, one shared variance fitted to the residuals, and log2 B bits to name the block."""
    gap = torch.cdist(x, means).square()
    nearest = gap.min(1)
    n, d = x.shape
    variance = (nearest.values.sum() / (n * d)).clamp_min(1e-12)
    nats = nearest.values / (2 * variance) + d / 2 * torch.log(2 * math.pi * variance)
    return nats / math.log(2) + math.log2(len(means)), nearest.indices


def refined(x: Tensor, means: Tensor, sweeps: int = 10) -> Tensor:
    """Lloyd's sweeps; a block that loses all its tokens stays where it was."""
    for _ in range(sweeps):
        near = torch.cdist(x, means).argmin(1)
        total = torch.zeros_like(means).index_add_(0, near, x)
        count = torch.bincount(near, minlength=len(means)).to(x)[:, None]
        means = torch.where(count > 0, total / count.clamp_min(1), means)
    return means


def split(x: Tensor, labels: Tensor, means: Tensor, block: int) -> Tensor:
    """Means with `block` split along its direction of largest spread."""
    own = x[labels == block]
    away = own - own.mean(0)
    direction = torch.linalg.svd(away, full_matrices=False)[2][0]
    side = away @ direction > 0
    halves = torch.stack([own[part].mean(0) if bool(part.any()) else own.mean(0) for part in (side, ~side)])
    return torch.cat((means[:block], means[block + 1 :], halves))


@register("localist-recruitment", kind="experiment")
def recruit(
    x: Tensor, *, margin: float = 8.0, cost: Callable[[int, int, int], float] = block_cost, cost_factor: float = 1.0, max_blocks: int = 64
) -> Recruitment:
    """x (N, D) tokens. Starts with one block; tries the worst-coded block first; recruits where bits saved exceed the new total cost by more than
    `margin` (> 0, which bounds the number of steps by (J_0 - J_end) / margin), and prunes where leaving a block out saves as much."""
    if x.dim() != 2 or len(x) < 4 or margin <= 0:
        raise RegardError(f"x has shape {tuple(x.shape)}, margin={margin}: expected (N, D) with at least 4 tokens, and a positive margin")
    n, d = x.shape

    def total(means: Tensor) -> tuple[float, float, Tensor]:
        bits, labels = coded(x, means)
        price = cost_factor * sum(cost(n, len(means), d + 1) for _ in range(len(means)))
        return float(bits.sum()), price, labels

    means = x.mean(0, keepdim=True)
    bits, price, labels = total(means)
    state = Recruitment(means, labels, bits + price)
    changed = True
    while changed and len(state.means) < max_blocks:
        changed = False
        worst = torch.zeros(len(state.means), dtype=x.dtype).index_add_(0, state.labels, coded(x, state.means)[0])
        for block in worst.argsort(descending=True).tolist():
            if int((state.labels == block).sum()) < 4:
                continue
            if try_change(state, "recruit", block, refined(x, split(x, state.labels, state.means, block)), total, margin):
                changed = True
                break
        else:
            for block in range(len(state.means) if len(state.means) > 1 else 0):
                rest = torch.cat((state.means[:block], state.means[block + 1 :]))
                if try_change(state, "prune", block, refined(x, rest), total, margin):
                    changed = True
                    break
    return state


def try_change(
    state: Recruitment, what: str, block: int, means: Tensor, total: Callable[[Tensor], tuple[float, float, Tensor]], margin: float
) -> bool:
    """Accept the new means if J falls by more than the margin; either way the decision is kept."""
    old_bits, old_price, _ = total(state.means)
    bits, price, labels = total(means)
    accepted = bits + price < state.length - margin
    state.trace.append(Decision(what, block, old_bits - bits, price - old_price, bits + price if accepted else state.length, accepted))
    if accepted:
        state.means, state.labels, state.length = means, labels, bits + price
    return accepted


@dataclass
class Experts:
    """Models recruited for domains: `route(x)` is a softmax over their anchors, `trace` the decisions."""

    models: list[Tensor]
    anchors: Tensor
    trace: list[Decision]

    def route(self, x: Tensor, temperature: float = 0.1) -> Tensor:
        """x (N, D) -> (N, experts)."""
        return (torch.nn.functional.normalize(x, dim=-1) @ self.anchors.T / temperature).softmax(-1)


def recruit_experts(domains: list[tuple[Tensor, Tensor]], vocab: int, price: float | None = None, margin: float = 8.0) -> Experts:
    """The outer level: for each domain in turn, (features (D,), tokens (N,)), a bigram model of its own is recruited iff it codes a held-out
    half of the domain's tokens in fewer bits than the best expert so far, by more than its cost: `price`, or (parameters / 2) log2 N bits."""
    models: list[Tensor] = []
    marks: list[Tensor] = []
    trace: list[Decision] = []

    def bits(model: Tensor, tokens: Tensor) -> float:
        return float(-model[tokens[:-1], tokens[1:]].log2().sum())

    length = 0.0
    for at, (feature, tokens) in enumerate(domains):
        first, second = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
        counts = torch.full((vocab, vocab), 0.5).index_put_((first[:-1], first[1:]), torch.ones(len(first) - 1), accumulate=True)
        own = counts / counts.sum(-1, keepdim=True)
        used = int((counts > 0.5).sum())
        cost = used / 2 * math.log2(len(tokens)) if price is None else price
        known = min((bits(model, second) for model in models), default=len(second) * math.log2(vocab))
        gain = known - bits(own, second)
        accepted = gain > cost + margin or not models
        length += bits(own, second) + cost if accepted else known
        trace.append(Decision("recruit", at, gain, cost, length, accepted))
        if accepted:
            models.append(own)
            marks.append(torch.nn.functional.normalize(feature, dim=-1))
    return Experts(models, torch.stack(marks), trace)
