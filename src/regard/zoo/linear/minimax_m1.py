"""CISPO beside PPO, GRPO and DAPO: losses on verifiable rewards, and a tiny run on a hybrid model (MiniMax-M1, id 83; 2025).

CISPO: -1/sum_i |o_i| sum_it sg(clip(r_it, 1 - eps_low, 1 + eps_high)) A_i log pi(o_it): weights are clipped, no token loses its gradient
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.plots import figure
from regard.zoo.linear.minimax_01 import MiniMaxConfig, MiniMaxLike

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """(R - mean) / std along the last dimension, the responses to one prompt; zeros where all rewards are equal."""
    spread = rewards.std(-1, correction=0, keepdim=True)
    return torch.where(spread > eps, (rewards - rewards.mean(-1, keepdim=True)) / spread.clamp_min(eps), 0.0)


def ratio_of(logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    if logp.shape != logp_old.shape or logp.shape != mask.shape or logp.shape[:-1] != advantages.shape:
        raise RegardError(
            f"logp {tuple(logp.shape)}, logp_old {tuple(logp_old.shape)}, mask {tuple(mask.shape)}, advantages {tuple(advantages.shape)}: "
            "expected (responses, tokens) three times and one advantage a response"
        )
    return torch.exp(torch.where(mask, logp - logp_old.detach(), 0.0))


def token_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum().clamp_min(1)


def cispo_loss(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    eps_low: float = math.inf,
    eps_high: float = 0.2,
    drop: bool = False,
) -> Tensor:
    """A scalar to minimise. logp, logp_old (responses, tokens): of the sampled tokens, new and old policy; advantages (responses,); mask
    (responses, tokens) bool: tokens that count. drop: leave out the tokens that PPO's clip would (A > 0 and r > 1 + eps_high, or A < 0 and
    r < 1 - eps_low)."""
    ratio = ratio_of(logp, logp_old, advantages, mask).detach()
    a = advantages[..., None]
    if drop:
        clipped = ((a > 0) & (ratio > 1 + eps_high)) | ((a < 0) & (ratio < 1 - eps_low))
        a = torch.where(clipped, 0.0, a)
    return -token_mean(ratio.clamp(1 - eps_low, 1 + eps_high) * a * torch.where(mask, logp, 0.0), mask)


def ppo_loss(logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor, eps_low: float = 0.2, eps_high: float = 0.2) -> Tensor:
    """-mean over tokens of min(r A, clip(r) A); with eps_high > eps_low it is DAPO's."""
    ratio, a = ratio_of(logp, logp_old, advantages, mask), advantages[..., None]
    return -token_mean(torch.minimum(ratio * a, ratio.clamp(1 - eps_low, 1 + eps_high) * a), mask)


def grpo_loss(logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor, eps: float = 0.2) -> Tensor:
    """PPO's clip, tokens averaged inside each response first, then responses."""
    ratio, a = ratio_of(logp, logp_old, advantages, mask), advantages[..., None]
    each = torch.minimum(ratio * a, ratio.clamp(1 - eps, 1 + eps) * a) * mask
    return -(each.sum(-1) / mask.sum(-1).clamp_min(1)).mean()


def dapo_loss(logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """PPO's with the higher upper clip 0.28."""
    return ppo_loss(logp, logp_old, advantages, mask, 0.2, 0.28)


LOSSES: dict[str, Loss] = {"cispo": cispo_loss, "ppo": ppo_loss, "grpo": grpo_loss, "dapo": dapo_loss}


@dataclass(frozen=True)
class PolicyRun:
    """rewards: mean of each round; loss: the name of the loss."""

    rewards: tuple[float, ...]
    loss: str

    def plot(self) -> str:
        """The rewards as an SVG."""
        return figure("Rewards", "round", "mean reward", {self.loss: [(float(n), r) for n, r in enumerate(self.rewards)]})


@register("minimax-m1", kind="module")
def policy_run(
    loss: str = "cispo",
    rounds: int = 40,
    prompts: int = 16,
    group: int = 8,
    digits: int = 4,
    answer: int = 3,
    updates: int = 2,
    lr: float = 3e-3,
    seed: int = 0,
) -> PolicyRun:
    """A hybrid of lightning and softmax layers learns to say `answer` digits whose sum is the first digit of the prompt modulo `digits`.

    A response earns 1 when that is so, else 0. Each round samples `group` responses to each of `prompts` and takes `updates` steps of AdamW
    (betas 0.9, 0.95, eps 1e-15) by the loss: "cispo", "ppo", "grpo" or "dapo"."""
    if loss not in LOSSES:
        raise RegardError(f"loss={loss!r}; expected one of {', '.join(LOSSES)}")
    torch.manual_seed(seed)
    model = MiniMaxLike(MiniMaxConfig(vocab=digits + 1, dim=32, layers=4, heads=2, period=4, hidden=48, experts=1))
    optimiser = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)
    history = []
    for _ in range(rounds):
        first = torch.randint(digits, (prompts,)).repeat_interleave(group)
        prompt = torch.stack((torch.full_like(first, digits), first), -1)
        tokens, logp_old = sampled(model, prompt, answer)
        rewards = (tokens.sum(-1) % digits == first).float()
        history.append(float(rewards.mean()))
        advantages = group_advantages(rewards.view(prompts, group)).flatten()
        whole = torch.cat((prompt, tokens), 1)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        for _ in range(updates):
            logits = model(whole[:, :-1])[:, prompt.shape[1] - 1 :, :digits]
            logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
            optimiser.zero_grad()
            LOSSES[loss](logp, logp_old, advantages, mask).backward()
            optimiser.step()
    return PolicyRun(tuple(history), loss)


@torch.no_grad()
def sampled(model: MiniMaxLike, prompt: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(tokens (B, count), their log probabilities) drawn from the model, all tokens but the last of the vocabulary (the separator)."""
    logits, states = model.step(prompt)
    tokens, logps = [], []
    for _ in range(count):
        logp = logits[:, -1, :-1].log_softmax(-1)
        new = torch.multinomial(logp.exp(), 1)
        tokens.append(new)
        logps.append(logp.gather(-1, new))
        logits, states = model.step(new, states)
    return torch.cat(tokens, 1), torch.cat(logps, 1)


def repeats(probabilities: Tensor, limit: float = 0.99, run: int = 3000) -> bool:
    """Whether a rollout is stuck: its last `run` tokens all had probability above `limit`."""
    return len(probabilities) >= run and bool((probabilities[-run:] > limit).all())
