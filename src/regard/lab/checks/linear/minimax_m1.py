"""Checks of minimax-m1."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.verification import check
from regard.zoo.linear.minimax_01 import MiniMaxConfig, MiniMaxLike
from regard.zoo.linear.minimax_m1 import cispo_loss, dapo_loss, group_advantages, grpo_loss, policy_run, ppo_loss, repeats, sampled


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


@check(
    "minimax-m1",
    "ratios of all sizes, a mask, drawn advantages: CISPO, PPO, GRPO and DAPO == their sums token by token, values and gradients",
    below=1e-10,
    control="each with another's clip or average",
)
def _() -> tuple[float, float]:
    logp = (-torch.rand(4, 6, dtype=F64)).requires_grad_()
    old, a = logp.detach() + 0.5 * torch.randn(4, 6, dtype=F64), torch.randn(4, dtype=F64)
    mask = torch.rand(4, 6) < 0.7
    mask[:, 0] = True

    def token(kind: str, i: int, t: int) -> Tensor:
        r = torch.exp(logp[i, t] - old[i, t])
        if kind.startswith("cispo"):
            w = r.detach().clamp(0.7, 1.3)
            over = bool((a[i] > 0) & (r > 1.3)) or bool((a[i] < 0) & (r < 0.7))
            return 0 * logp[i, t] if kind == "cispo drop" and over else w * a[i] * logp[i, t]
        low, high = (0.8, 1.28) if kind == "dapo" else (0.8, 1.2)
        return torch.minimum(r * a[i], r.clamp(low, high) * a[i])

    def truth(kind: str) -> Tensor:
        rows = [[token(kind, i, t) for t in range(6) if mask[i, t]] for i in range(4)]
        if kind == "grpo":  # each response's mean first
            return -torch.stack([torch.stack(row).mean() for row in rows]).mean()
        return -torch.cat([torch.stack(row) for row in rows]).mean()

    losses: dict[str, Callable[[], Tensor]] = {
        "cispo": lambda: cispo_loss(logp, old, a, mask, 0.3, 0.3),
        "cispo drop": lambda: cispo_loss(logp, old, a, mask, 0.3, 0.3, drop=True),
        "ppo": lambda: ppo_loss(logp, old, a, mask),
        "grpo": lambda: grpo_loss(logp, old, a, mask),
        "dapo": lambda: dapo_loss(logp, old, a, mask),
    }
    names = list(losses)
    own = max(gap_with_gradients(losses[name](), truth(name), (logp,)) for name in names)
    others = zip(names, names[1:] + names[:1], strict=True)
    return own, min(gap_with_gradients(losses[name](), truth(other), (logp,)) for name, other in others)


@check(
    "minimax-m1",
    "sampling tells each token's probability under the full pass; a rollout is stuck after `run` tokens above the limit",
    below=1e-5,
    control="probabilities of the tokens before",
)
def _() -> tuple[float, float]:
    model = MiniMaxLike(MiniMaxConfig(vocab=6, dim=32, layers=4, heads=2, period=4, hidden=16, experts=1))
    torch.nn.init.normal_(model.head.weight, std=0.3)
    prompt = torch.randint(5, (3, 2))
    tokens, logp = sampled(model, prompt, 5)
    logits = model(torch.cat((prompt, tokens), 1))[:, 1:-1, :5].log_softmax(-1).detach()
    truth = logits.gather(-1, tokens[..., None])[..., 0]
    high = torch.full((20,), 0.995)
    dip = high.clone()
    dip[12] = 0.5
    stuck = (repeats(high, run=20), repeats(high, run=21), repeats(dip, run=20), repeats(dip, run=7), repeats(high, limit=0.996, run=5))
    bad = 0.0 if stuck == (True, False, False, True, False) else math.inf
    return max(bad, naive.gap(logp, truth)), naive.gap(logp[:, :-1], truth[:, 1:])


@check("minimax-m1", "25 rounds on sums of digits: mean reward of the last five", above=0.8, control="without steps")
def _() -> tuple[float, float]:
    return sum(policy_run("cispo", rounds=25).rewards[-5:]) / 5, sum(policy_run("cispo", rounds=25, lr=0.0).rewards[-5:]) / 5
