"""Linear log-normal attention: exponential features whose temperatures give the weights softmax's log-variance (id 31; Nahshan et al., 2023).

phi_q(q) = exp(alpha q), phi_k(k) = exp(beta k),   alpha = t / sigma_q, beta = t / sigma_k,   t^2 = (sigma_q^2 sigma_k^2 - b) / 2a
"""

import torch
from torch import Tensor

from ...algebra import FeatureMap, FixedBlock, Hybrid, Input, JointMap, Learned, Recipe, Recurrent, Weighted, bind
from ...catalog.registry import register
from ...errors import RegardError

A, B = 0.14855178144710912, -0.35487039130661086  # the paper's fit of measured log-variances, near D = 64


def temperature(sigma_q: Tensor, sigma_k: Tensor, a: float, b: float) -> Tensor:
    return ((sigma_q.square() * sigma_k.square() - b) / (2 * a)).sqrt()


def exp_shifted(x: Tensor) -> Tensor:
    """exp of x minus its largest channel, which the readout divides out."""
    return torch.exp(x - x.amax(-1, keepdim=True).detach())


def spread(x: Tensor, real: Tensor | None) -> Tensor:
    return (x if real is None else x.movedim(1, 2)[real[:, 0, :, 0]]).detach().std()


def matched(q: Tensor, k: Tensor, real: Tensor | None, a: float, b: float) -> tuple[Tensor, Tensor]:
    sigma_q, sigma_k = spread(q, real if q.shape[-2] == k.shape[-2] else None), spread(k, real)
    t = temperature(sigma_q, sigma_k, a, b)
    return exp_shifted(q * t / sigma_q), k * t / sigma_k


def frozen_query(q: Tensor, sigma_q: Tensor, sigma_k: Tensor, a: float, b: float) -> Tensor:
    return exp_shifted(q * temperature(sigma_q, sigma_k, a, b) / sigma_q)


def frozen_key(k: Tensor, sigma_q: Tensor, sigma_k: Tensor, a: float, b: float) -> Tensor:
    return k * temperature(sigma_q, sigma_k, a, b) / sigma_k


@register("lln-attention")
def lln(
    statistics: str = "batch", diagonal: bool = False, block_size: int = 64, a: float = A, b: float = B, eps: float = 0.0
) -> Recurrent | Hybrid:
    """statistics: "batch": sigma_q and sigma_k are the standard deviations of the call's q and k (without gradient), which reads all
    tokens, so in both directions only; "given": the inputs `sigma_q` and `sigma_k` (scalars, a running average), as decoding needs.
    diagonal: the mean with softmax attention inside blocks of block_size (the paper's: the head dimension). a, b: refit for D far from 64.
    """
    if statistics not in ("batch", "given"):
        raise RegardError(f"statistics={statistics!r}; expected batch or given")
    sigmas = tuple(Input(f"sigma_{side}", "", default=1.0, layer=Learned(1.0, trainable=False)) for side in "qk")
    known = {"a": a, "b": b}
    feature = (
        JointMap(bind(matched, **known))
        if statistics == "batch"
        else FeatureMap(bind(frozen_query, **known), bind(frozen_key, **known), inputs=sigmas)
    )
    linear = Recurrent(feature, keys="max", readout="sum", eps=eps, scaled=False, recipe=Recipe(rope=False))
    if not diagonal:
        return linear
    return Hybrid((linear, Weighted(mask=FixedBlock(block_size))), how="blend", shares=(0.5, 0.5), recipe=Recipe(rope=False))


def fit(head_dim: int, length: int = 256, seed: int = 0) -> tuple[float, float]:
    """(a, b) of another head_dim: the line through measured log-variances of the weights, t^2 (sigma_q^2 sigma_k^2 with alpha = beta) in [1, 6]."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(8, length, head_dim, generator=generator, dtype=torch.float64) for _ in range(2))
    squares = torch.linspace(1, 6, 11, dtype=torch.float64)
    found = torch.stack([((q * t).exp() @ (k * t).exp().mT).log().var(-1).mean() for t in squares.sqrt()])
    x = torch.stack((2 * squares, torch.ones_like(squares)), -1)
    slope, offset = torch.linalg.lstsq(x, found).solution.tolist()
    return float(slope), float(offset)
