"""Linear log-normal attention: exponential features whose temperatures give the weights softmax's log-variance (id 31; Nahshan et al., 2023).

phi_q(q) = exp(alpha q), phi_k(k) = exp(beta k),   alpha = t / sigma_q, beta = t / sigma_k,   t^2 = (sigma_q^2 sigma_k^2 - b) / 2a
"""

import torch
from torch import Tensor

from regard.algebra import FeatureMap, FixedBlock, Hybrid, Input, JointMap, Learned, Recipe, Recurrent, Weighted, bind
from regard.catalog.registry import register
from regard.errors import RegardError

A, B = 0.14855178144710912, -0.35487039130661086  # the paper's fit of measured log-variances, near D = 64


def temperature(sigma_q: Tensor, sigma_k: Tensor, a: float, b: float) -> Tensor:
    return ((sigma_q.square() * sigma_k.square() - b) / (2 * a)).sqrt()


def exp_shifted(x: Tensor) -> Tensor:
    """exp of x minus its largest channel, which the readout divides out but for eps."""
    return torch.exp(x - x.amax(-1, keepdim=True))


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


def shifted_key(k: Tensor, sigma_q: Tensor, sigma_k: Tensor, key_max: Tensor, a: float, b: float) -> Tensor:
    return torch.exp(frozen_key(k, sigma_q, sigma_k, a, b) - key_max)


@register("lln-attention")
def lln(
    statistics: str = "batch",
    diagonal: bool | str = False,
    block_size: int = 64,
    a: float = A,
    b: float = B,
    eps: float = 1e-8,
    shift: str = "running",
) -> Recurrent | Hybrid:
    """statistics: "batch": sigma_q and sigma_k are the standard deviations of the call's q and k (without gradient), which reads all
    tokens, so in both directions only; "given": the inputs `sigma_q` and `sigma_k` (scalars, a running average), as decoding needs.
    diagonal: with softmax attention inside blocks of block_size (the paper's: the head dimension): True, their mean; "channels", a factor a
    channel for each, input `blend` (2, H, Dv). a, b: refit for D far from 64. eps: added to the divisor, the sum of keys' exponentials over
    e^m. shift: m is the largest key so far, "running", or "given", the input `key_max` (B, H) (released: of all keys, later ones too).
    """
    if statistics not in ("batch", "given") or shift not in ("running", "given") or (shift == "given" and statistics == "batch"):
        raise RegardError(
            f"statistics={statistics!r}, shift={shift!r}; expected batch or given, and running or given (with given statistics)"
        )
    if diagonal not in (False, True, "channels"):
        raise RegardError(f"diagonal={diagonal!r}; expected False, True or channels")
    sigmas = tuple(Input(f"sigma_{side}", "", default=1.0, layer=Learned(1.0, trainable=False)) for side in "qk")
    known = {"a": a, "b": b}
    feature: FeatureMap | JointMap
    if statistics == "batch":
        feature = JointMap(bind(matched, **known))
    elif shift == "running":
        feature = FeatureMap(bind(frozen_query, **known), bind(frozen_key, **known), inputs=sigmas)
    else:
        feature = FeatureMap(bind(frozen_query, **known), bind(shifted_key, **known), inputs=(*sigmas, Input("key_max", "bh")))
    keys = "max" if shift == "running" else "features"
    linear = Recurrent(feature, keys=keys, readout="add", eps=eps, scaled=False, recipe=Recipe(rope=False))
    if not diagonal:
        return linear
    how = "channels" if diagonal == "channels" else "blend"
    return Hybrid((linear, Weighted(mask=FixedBlock(block_size))), how=how, shares=(0.5, 0.5), recipe=Recipe(rope=False))


def fit(head_dim: int, length: int = 256, seed: int = 0) -> tuple[float, float]:
    """(a, b) of another head_dim: the line through measured log-variances of the weights, t^2 (sigma_q^2 sigma_k^2 with alpha = beta) in [1, 6]."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(8, length, head_dim, generator=generator, dtype=torch.float64) for _ in range(2))
    squares = torch.linspace(1, 6, 11, dtype=torch.float64)
    found = torch.stack([((q * t).exp() @ (k * t).exp().mT).log().var(-1).mean() for t in squares.sqrt()])
    x = torch.stack((2 * squares, torch.ones_like(squares)), -1)
    slope, offset = torch.linalg.lstsq(x, found).solution.tolist()
    return float(slope), float(offset)
