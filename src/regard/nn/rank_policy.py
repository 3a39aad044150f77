"""A small network that chooses one of a few ranks, among those that are safe."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import RegardError
from .parts import Momentary


class Choice(NamedTuple):
    """chosen (B,): the index of a rank; log_prob (B,) of it, 0 where it was explored; probs (B, actions) of the policy over safe ranks."""

    chosen: Tensor
    log_prob: Tensor
    probs: Tensor


class RankPolicy(nn.Module):
    """State [mean over time of relu(conv3(x)) (64), linear of 9 statistics of weights (32), embedding of the last choice (32)] -> logits.

    The state is one token of a Transformer encoder, then an MLP 128 -> 64 -> actions. energy: a linear of the ratios of energy kept at each
    rank is added to the state.
    """

    def __init__(
        self,
        dim: int,
        actions: int,
        features: int = 64,
        stats: int = 32,
        memory: int = 32,
        heads: int = 4,
        layers: int = 2,
        hidden: int = 256,
        head_hidden: int = 64,
        dropout: float = 0.1,
        energy: bool = False,
    ):
        super().__init__()
        width = features + stats + memory
        if actions < 1 or heads < 1 or width % heads:
            raise RegardError(f"actions={actions}, heads={heads}: expected 1 or more, and heads that divide the state's {width} numbers")
        self.conv = nn.Conv1d(dim, features, 3, padding=1)
        self.stats, self.memory = nn.Linear(9, stats), nn.Embedding(actions, memory)
        self.energy = nn.Linear(actions, width) if energy else None
        block = nn.TransformerEncoderLayer(width, heads, hidden, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(width, head_hidden), nn.ReLU(), nn.Linear(head_hidden, actions))

    def forward(self, x: Tensor, stats: Tensor, previous: Tensor, keep: Tensor | None = None, energy: Tensor | None = None) -> Tensor:
        """x (B, T, dim), stats (B, 9), previous (B,) long, keep (B, T) bool, energy (B, actions) -> logits (B, actions)."""
        if keep is None:
            keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        there = keep.unsqueeze(1)
        seen = torch.relu(self.conv(torch.where(there, x.mT, 0.0)))
        h = torch.where(there, seen, 0.0).sum(-1) / keep.sum(-1, keepdim=True).clamp_min(1)
        state = torch.cat((h, self.stats(stats), self.memory(previous)), -1)
        if self.energy is not None:
            if energy is None:
                raise RegardError("energy is None; expected the ratio at each rank, as this policy reads it")
            state = state + self.energy(energy)
        return self.head(self.encoder(state.unsqueeze(1)).squeeze(1))  # type: ignore[no-any-return]


def choose(logits: Tensor, safe: Tensor, explore: float = 0.0, greedy: bool = False, generator: torch.Generator | None = None) -> Choice:
    """A rank of those safe (B, actions) bool: the likeliest (greedy), or a draw of the policy, or, with probability `explore`, any safe one."""
    if not bool(safe.any(-1).all()):
        raise RegardError("safe: expected a safe rank in each row")
    if not 0 <= explore <= 1:
        raise RegardError(f"explore={explore}; expected a number from 0 to 1")
    log_probs = logits.float().masked_fill(~safe, -torch.inf).log_softmax(-1)
    probs = log_probs.exp()
    if greedy:
        index = log_probs.argmax(-1)
        return Choice(index, log_probs.gather(-1, index[:, None])[:, 0], probs)
    wild = torch.rand(len(logits), generator=generator, device=logits.device) < explore
    index = torch.multinomial(torch.where(wild[:, None], safe.float(), probs.detach()), 1, generator=generator)[:, 0]
    own = log_probs.gather(-1, index[:, None])[:, 0]
    return Choice(index, torch.where(wild, 0.0, own), probs)  # an explored rank is no draw of the policy: it teaches nothing


class RankChooser(Momentary):
    """A layer that chooses ranks. A pass in training leaves, each (B, choices): chosen (index of the rank), decided (bool: a choice was made),
    log_prob of it, and its fidelity (cosine of outputs with those of full rank), cost (FLOPs over those of full rank) and change (||dA||_F).

    threshold: a buffer, the largest change that is safe. explore: how often training draws any safe rank.
    """

    threshold: Tensor
    explore: float
    log_prob: Tensor | None = None
    chosen: Tensor
    decided: Tensor
    fidelity: Tensor
    cost: Tensor
    change: Tensor


def rank_reward(fidelity: Tensor, cost: Tensor, change: Tensor, alpha: float = 1.0, beta: float = 0.05, gamma: float = 0.1) -> Tensor:
    """alpha * fidelity - beta * cost - gamma * change: cosine of outputs, FLOPs over those of full rank, ||dA||_F."""
    return alpha * fidelity - beta * cost - gamma * change


class RankTraining:
    """Joint training of a model and the policies of its `RankChooser` layers: L_LM + weight * policy loss, by `optimizer` (None: AdamW of rate lr).

    baseline: a running mean of rewards, `momentum` of it kept. Each update multiplies the layers' thresholds and rates of exploration by `decay`.
    alpha, beta, gamma: of `rank_reward`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 5e-5,
        optimizer: torch.optim.Optimizer | None = None,
        weight: float = 0.1,
        alpha: float = 1.0,
        beta: float = 0.05,
        gamma: float = 0.1,
        momentum: float = 0.9,
        decay: float = 0.995,
    ):
        self.model, self.weight, self.rates, self.momentum, self.decay = model, weight, (alpha, beta, gamma), momentum, decay
        self.layers = [one for one in model.modules() if isinstance(one, RankChooser)]
        if not self.layers or not 0 <= momentum < 1 or not 0 < decay <= 1:
            raise RegardError(f"model, momentum={momentum}, decay={decay}: expected layers that choose, 0 to 1, above 0 to 1")
        self.optimizer = torch.optim.AdamW(model.parameters(), lr) if optimizer is None else optimizer
        self.baseline: float | None = None

    def rewards(self) -> Tensor:
        """The last pass's, of each layer, row and segment with a choice, (N,)."""
        return torch.cat([rank_reward(one.fidelity, one.cost, one.change, *self.rates)[one.decided] for one in self.layers]).detach()

    def policy_loss(self, rewards: Tensor) -> Tensor:
        """-mean of log pi(a | s) (R - baseline); the first baseline is the rewards' own mean."""
        log_probs = torch.cat([one.log_prob[one.decided] for one in self.layers])  # type: ignore[index]
        base = float(rewards.mean()) if self.baseline is None else self.baseline
        return -(log_probs * (rewards - base)).mean()

    def step(self, loss: Tensor) -> tuple[float, float]:
        """One update after the model's pass that gave the task's loss (zero: the policy alone) -> (loss, mean reward)."""
        rewards = self.rewards()
        if rewards.numel():
            total = loss + self.weight * self.policy_loss(rewards)
            now = float(rewards.mean())
            self.baseline = now if self.baseline is None else self.momentum * self.baseline + (1 - self.momentum) * now
        else:
            total = loss
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        for layer in self.layers:
            layer.threshold.mul_(self.decay)
            layer.explore *= self.decay
        return float(loss), float(rewards.mean()) if rewards.numel() else math.nan
