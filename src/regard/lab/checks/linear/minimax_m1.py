"""Checks of minimax-m1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.linear.minimax_01 import MiniMaxConfig, MiniMaxLike
from regard.zoo.linear.minimax_m1 import cispo_loss, group_advantages, grpo_loss, policy_run, ppo_loss


def policy_inputs() -> tuple[Tensor, Tensor, Tensor]:
    logp = (-torch.rand(6, 5, dtype=F64)).requires_grad_()
    return logp, group_advantages(torch.randn(2, 3, dtype=F64)).flatten(), torch.ones(6, 5, dtype=torch.bool)


@check(
    "minimax-m1",
    "equal policies: the gradients of CISPO, PPO and GRPO == REINFORCE with group advantages",
    below=1e-12,
    control="rewards not normalised",
)
def _() -> tuple[float, float]:
    logp, a, mask = policy_inputs()
    truth = -a[:, None].expand(6, 5) / 30
    own = [naive.gap(torch.autograd.grad(loss(logp, logp.detach(), a, mask), logp)[0], truth) for loss in (cispo_loss, ppo_loss, grpo_loss)]
    raw = torch.autograd.grad(cispo_loss(logp, logp.detach(), 2 * a + 1, mask), logp)[0]
    return max(own), naive.gap(raw, truth)


@check(
    "minimax-m1",
    "a token of ratio 3, A > 0, eps_high 0.2: gradient less 1.2 A; with dropping, and for PPO and GRPO, 0",
    below=1e-12,
    control="without the stop-gradient",
)
def _() -> tuple[float, float]:
    logp, a, mask = policy_inputs()
    a = a.abs() + 0.1
    old = logp.detach().clone()
    old[0, 0] -= math.log(3)

    def slope(loss: Tensor) -> float:
        return float(torch.autograd.grad(loss, logp)[0][0, 0]) * 30

    zero = [
        slope(cispo_loss(logp, old, a, mask, 0.2, 0.2, drop=True)),
        slope(ppo_loss(logp, old, a, mask)),
        slope(grpo_loss(logp, old, a, mask)),
    ]
    own = max(abs(slope(cispo_loss(logp, old, a, mask)) + 1.2 * float(a[0])), *map(abs, zero))
    ratio = torch.exp(logp - old).clamp_max(1.2)
    leaky = slope(-(ratio * a[:, None] * logp).mean())
    ratio3 = slope(-(torch.exp(logp - old) * a[:, None] * logp).mean())
    return own, max(abs(leaky + 1.2 * float(a[0])), abs(ratio3 + 1.2 * float(a[0])))


@check(
    "minimax-m1",
    "equal rewards in a group: loss and gradient are 0; rewards x 7: gradients unchanged",
    below=1e-9,
    control="advantages not divided by their spread",
)
def _() -> tuple[float, float]:
    logp, _, mask = policy_inputs()
    rewards = torch.randn(2, 3, dtype=F64)

    def grad(a: Tensor) -> Tensor:
        return torch.autograd.grad(cispo_loss(logp, logp.detach(), a.flatten(), mask), logp)[0]

    equal = group_advantages(torch.full((2, 3), 0.7, dtype=F64))
    own = max(float(grad(equal).abs().max()), naive.gap(grad(group_advantages(7 * rewards)), grad(group_advantages(rewards))))
    centred = rewards - rewards.mean(-1, keepdim=True)
    return own, naive.gap(grad(7 * centred), grad(centred))


@check(
    "minimax-m1",
    "8 layers, one of softmax: state after 4096 tokens over an all-softmax stack's, less 1/8",
    below=0.00625,
    control="two softmax layers of eight",
)
def _() -> tuple[float, float]:
    def share(period: int) -> float:
        sizes = {}
        for p in (period, 1):
            model = MiniMaxLike(MiniMaxConfig(vocab=30, dim=32, layers=8, heads=4, kv_heads=4, period=p, hidden=16, experts=1))
            with torch.no_grad():
                states = model.step(torch.randint(30, (1, 4096)))[1]
            sizes[p] = sum(s.bytes for s in states)
            if sizes[p] != model.cost(4096)[1]:
                return math.nan
        fixed = 4 * 32 * 8 * (8 - 8 // period)
        return abs((sizes[period] - fixed) / sizes[1] - 1 / 8)

    return share(8), share(4)


@check("minimax-m1", "40 rounds on sums of digits: mean reward of the last five", above=0.8, control="rewards drawn at random")
def _() -> tuple[float, float]:
    from regard.zoo.linear import minimax_m1 as policy

    own = sum(policy_run("cispo").rewards[-5:]) / 5
    real, torch_rand = policy.group_advantages, torch.randn
    try:  # the same run, told nothing of the rewards
        policy.group_advantages = lambda r, eps=1e-6: real(torch_rand(r.shape), eps)  # type: ignore[assignment]
        blind = sum(policy_run("cispo").rewards[-5:]) / 5
    finally:
        policy.group_advantages = real
    return own, blind
