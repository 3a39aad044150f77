"""Fixed head size: heads as wide as the sequence is long, however many there are (id 53; Bhojanapalli et al., 2020).

W_q, W_k, W_v in R^{d x (h d_h)}, W_o in R^{(h d_h) x d}, d_h free;   with d_h >= n every positive row-stochastic P is attention's, for X (n, d)
of full row rank: sqrt(d_h) log P = U S V^T, W_q = X^+ U S^{1/2}, W_k = X^+ V S^{1/2}.   With d_h < n some P is out of reach.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.attention import Attention
from regard.results import Result


@register("fixed-head-size", kind="module")
class FixedHeadMHA(Attention):
    """x (B, L, d_model) -> (B, L, d_model): multi-head attention whose heads have `head_size` channels, whatever d_model and heads are; 4 d_model
    heads head_size parameters, and as much more with biases. head_size: the sequence length n in the paper, a constant such as 32 to 128
    in practice. causal: then `step` decodes with a cache of 2 heads head_size numbers a token. Other options: of `regard.nn.Attention`."""

    def __init__(
        self,
        d_model: int,
        heads: int,
        head_size: int,
        *,
        causal: bool = False,
        rope: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
    ):
        if head_size < 1 or heads < 1:
            raise RegardError(f"heads={heads}, head_size={head_size}; expected 1 or more")
        super().__init__(d_model, heads, head_dim=head_size, causal=causal, rope=rope, bias=bias, dropout=dropout)


def attention_of(x: Tensor, wq: Tensor, wk: Tensor) -> Tensor:
    """softmax(x W_q (x W_k)^T / sqrt(d_h)) of x (n, d), wq, wk (d, d_h): (n, n), rows of sum one."""
    return ((x @ wq) @ (x @ wk).T / wq.shape[1] ** 0.5).softmax(-1)


@dataclass(frozen=True)
class Bottleneck(Result):
    """wq, wk (d, head_size); error: the largest entry of |P - attention|; exact: whether the closed form made it."""

    wq: Tensor
    wk: Tensor
    error: float
    exact: bool


def low_rank_bottleneck(x: Tensor, target: Tensor, head_size: int, *, steps: int = 3000, lr: float = 0.02, seed: int = 0) -> Bottleneck:
    """The projections by which one head attends by `target` (n, n), positive rows of sum one, on tokens x (n, d): the closed form where
    head_size >= n and x has rank n, else the best that Adam finds in `steps` on the cross-entropy, from the closed form's leading part."""
    n, dim = x.shape
    if target.shape != (n, n) or not bool((target > 0).all()) or not torch.allclose(target.sum(-1), torch.ones_like(target[0])):
        raise RegardError(f"target has shape {tuple(target.shape)}; expected ({n}, {n}), positive, rows of sum one")
    if int(torch.linalg.matrix_rank(x)) < n:
        raise RegardError(f"x {tuple(x.shape)} has a rank below {n}; expected independent tokens, so d >= n")
    logits = head_size**0.5 * target.log()
    u, s, vt = torch.linalg.svd(logits - logits.mean(-1, keepdim=True))
    inverse, width = torch.linalg.pinv(x), min(n, head_size)
    wq, wk = (x.new_zeros(dim, head_size) for _ in range(2))
    wq[:, :width] = inverse @ u[:, :width] * s[:width].sqrt()
    wk[:, :width] = inverse @ vt[:width].T * s[:width].sqrt()
    if head_size < n:
        generator = torch.Generator().manual_seed(seed)
        wq, wk = ((w + 1e-3 * torch.randn(w.shape, generator=generator, dtype=w.dtype)).requires_grad_() for w in (wq, wk))
        optimizer = torch.optim.Adam([wq, wk], lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            loss = -(target * attention_of(x, wq, wk).clamp_min(1e-300).log()).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    wq, wk = wq.detach(), wk.detach()
    error = float((attention_of(x, wq, wk) - target).abs().max())
    return Bottleneck(wq, wk, error, head_size >= n)
