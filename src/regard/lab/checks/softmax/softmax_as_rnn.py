"""Checks of softmax-as-rnn."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.zoo.softmax.softmax_as_rnn import ablation, stabilised, taylor_recurrent_attention


@check("softmax-as-rnn", "D = 2, n = 40: recurrences up to order 12 == causal softmax attention", below=1e-8, control="order 2")
def _() -> tuple[float, float]:
    q, k, v = small_scores()
    truth = attend(q, k, v, mask=Causal())
    return tuple(naive.gap(taylor_recurrent_attention(q, k, v, order), truth) for order in (12, 2))  # type: ignore[return-value]


def small_scores() -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with |q.k| / sqrt(2) <= 0.7."""
    q, k, v = qkv(40, 2)
    q, k = (x / x.norm(dim=-1).amax() * math.sqrt(0.7 * math.sqrt(2)) for x in (q, k))
    return q, k, v


@check(
    "softmax-as-rnn",
    "errors at orders 1, 2, 4, 8, 12 fall and stay under 10 / (N + 1)!: largest ratio to the order before, and to that bound",
    below=1.0,
    control="order 2 under every order's name",
)
def _() -> tuple[float, float]:
    q, k, v = small_scores()
    truth = attend(q, k, v, mask=Causal())

    def worst(found: list[float]) -> float:
        falls = [b / a for a, b in itertools.pairwise(found)]
        return max(*falls, *(e * math.factorial(n + 1) / 10 for e, n in zip(found, (1, 2, 4, 8, 12), strict=True)))

    own = worst([naive.gap(taylor_recurrent_attention(q, k, v, n), truth) for n in (1, 2, 4, 8, 12)])
    return own, worst([naive.gap(taylor_recurrent_attention(q, k, v, 2), truth)] * 5)


@check("softmax-as-rnn", "order 1 == linear attention with [1, k / 2^(1/4)]; order 0 == the running mean", below=1e-12, control="order 2")
def _() -> tuple[float, float]:
    q, k, v = small_scores()
    phi_q, phi_k = (torch.cat((torch.ones_like(x[..., :1]), x * 2**-0.25), -1) for x in (q, k))
    w = (phi_q @ phi_k.transpose(-1, -2)).tril()
    linear = (w / w.sum(-1, keepdim=True)) @ v
    mean = v.cumsum(-2) / torch.arange(1, 41, dtype=F64)[:, None]
    zero = naive.gap(taylor_recurrent_attention(q, k, v, 0), mean)
    return max(zero, naive.gap(taylor_recurrent_attention(q, k, v, 1), linear)), naive.gap(taylor_recurrent_attention(q, k, v, 2), linear)


@check(
    "softmax-as-rnn",
    "the L2-norm layer == normalize(sum_j e^s v); softmax's gradient without its denominator's == the detached form",
    below=1e-12,
    control="softmax",
)
def _() -> tuple[float, float]:
    x = torch.randn(1, 19, 16, dtype=F64)
    layer = Attention(16, 2, stabilised("l2")).double()
    q, k, v, _ = layer.heads_of(x, x, 0, None)
    s = (q @ k.transpose(-1, -2) / 8**0.5).clamp(max=5.0)
    bare = torch.exp(s).tril() @ v
    own = naive.gap(layer(x), layer.close(bare, x))
    soft = attend(q, k, v, mask=Causal())
    leaf = q.detach().requires_grad_()
    e = torch.exp(leaf @ k.detach().transpose(-1, -2) / 8**0.5).tril()
    (truth,) = torch.autograd.grad(((e / e.sum(-1, keepdim=True).detach()) @ v.detach()).square().sum(), leaf)
    (found,) = torch.autograd.grad(attend(leaf, k.detach(), v.detach(), stabilised("detach"), mask=Causal()).square().sum(), leaf)
    return max(own, naive.gap(found, truth)), naive.gap(layer(x), layer.out(soft.transpose(1, 2).flatten(-2)))


@check(
    "softmax-as-rnn",
    "150 steps on recalled pairs: loss with an L2 norm for the denominator",
    below=1.75,
    control="linear attention: order 1",
)
def _() -> tuple[float, float]:
    found = ablation(("l2", "order 1"), seed=1)
    return found["l2"], found["order 1"]
