"""What matrices of attention weights look like: sinks, spread, signs, agreement of heads, and what becomes of tokens over depth.

weights are (..., Lq, Lk) with Lq <= Lk, queries at the end of the keys, masked pairs zero; means run over all leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RegardError


def checked(weights: Tensor, dims: int = 2) -> Tensor:
    if weights.dim() < dims or weights.shape[-2] > weights.shape[-1]:
        raise RegardError(f"weights have shape {tuple(weights.shape)}; expected (..., Lq, Lk) with Lq <= Lk and at least {dims} dimensions")
    return weights.detach().double()


def importance(weights: Tensor) -> Tensor:
    """(..., Lk): the mean weight that each key gets from the queries that may see it causally, mean_{i >= k} A_ik."""
    w = checked(weights)
    q_len, k_len = w.shape[-2:]
    last = torch.arange(k_len) - (k_len - q_len)
    return w.sum(-2) / (q_len - last.clamp(min=0)).to(w)


def sink_rate(weights: Tensor, position: int = 0, eps: float = 0.3) -> float:
    """Share of maps (samples, layers, heads) whose importance of the key at `position` exceeds eps (Gu et al., 2024)."""
    return float((importance(weights)[..., position] > eps).double().mean())


def density(weights: Tensor) -> float:
    """Share of the causally visible pairs that are not exactly zero."""
    w = checked(weights)
    seen = torch.ones(w.shape[-2:], dtype=torch.bool).tril(w.shape[-1] - w.shape[-2])
    return float((w != 0)[..., seen].double().mean())


def confidence(weights: Tensor) -> Tensor:
    """(...): a head's mean largest weight (Voita et al., 2019)."""
    return checked(weights).amax(-1).mean(-1)


def entropy(weights: Tensor) -> Tensor:
    """(..., Lq): entropy of each row of |weights|, normalised to sum to one, in nats."""
    p = checked(weights).abs()
    p = p / p.sum(-1, keepdim=True).clamp_min(1e-300)
    return -torch.special.xlogy(p, p).sum(-1)


def concentration(weights: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """(...,): the mean share of a row's |weights| on keys within the size x size neighbourhood of its query; tokens (rows x columns = L) stand
    on a grid in row order, size is odd."""
    w = checked(weights).abs()
    length = grid[0] * grid[1]
    if w.shape[-2:] != (length, length) or size < 1 or size % 2 == 0:
        raise RegardError(
            f"weights {tuple(weights.shape)}, grid={grid}, size={size}; expected (..., L, L) with L = {length}, and an odd size"
        )
    at = torch.arange(length, device=w.device)
    row, column = at // grid[1], at % grid[1]
    near = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs()) <= size // 2
    return ((w * near).sum(-1) / w.sum(-1).clamp_min(1e-300)).mean(-1)


def head_diversity(weights: Tensor) -> float:
    """Generalised Jensen-Shannon divergence of heads, H(mean_h p_h) - mean_h H(p_h), mean over rows, in nats; weights (..., H, Lq, Lk)."""
    w = checked(weights, 3)
    return float((entropy(w.mean(-3)) - entropy(w).mean(-2)).mean())


def negative_mass(weights: Tensor) -> float:
    """Share of the absolute weight that is negative."""
    w = checked(weights)
    return float((-w.clamp_max(0)).sum() / w.abs().sum().clamp_min(1e-300))


def stochastic_gap(weights: Tensor) -> float:
    """Distance to a doubly stochastic matrix: mean |column sum - 1| of square weights (rows of softmax sum to 1 already)."""
    w = checked(weights)
    return float((w.sum(-2) - 1).abs().mean())


def kurtosis(x: Tensor) -> float:
    """Kurtosis of activations, E[(x - m)^4] / E[(x - m)^2]^2: 3 for a normal distribution, large with outliers."""
    x = x.detach().double().flatten()
    x = x - x.mean()
    return float(x.pow(4).mean() / x.pow(2).mean().square())


def token_distance(states: Tensor) -> float:
    """Mean pairwise distance of tokens (..., L, dim) over their mean norm: falls towards 0 as representations collapse."""
    x = states.detach().double()
    n = x.shape[-2]
    return float(torch.cdist(x, x).sum() / (n * (n - 1)) / (x.numel() / x.shape[-1] / n) / x.norm(dim=-1).mean())


def log_variance(weights: Tensor) -> Tensor:
    """Mean over rows of the variance of log weights: what linear log-normal attention matches to softmax's."""
    return checked(weights).log().var(-1).mean()


def spectral_gap(weights: Tensor) -> Tensor:
    """(...): 1 - |lambda_2| of square matrices whose rows sum to one: how fast repeated mixing forgets."""
    w = checked(weights)
    if w.shape[-1] != w.shape[-2]:
        raise RegardError(f"weights have shape {tuple(weights.shape)}; expected square matrices")
    return 1 - torch.linalg.eigvals(w).abs().sort(-1).values[..., -2]
