"""alpha-entmax with a learned alpha per head (id 29; Correia et al., 2019).

p_i = relu((alpha - 1) s_i - tau_i)^(1 / (alpha - 1)),   tau_i such that the row sums to one; alpha = 1 + sigmoid(a_h)
"""

import torch
from torch import Tensor

from ...algebra import Input, Learned, RowLocal, Weighted, bind
from ...catalog.registry import register
from ...errors import RegardError
from .sparsemax import above


def tempered(s: Tensor, c: Tensor, alpha: Tensor) -> Tensor:
    return torch.relu((alpha - 1) * (s - c)) ** (1 / (alpha - 1))


def tempered_half(s: Tensor, c: Tensor) -> Tensor:
    return torch.relu(0.5 * (s - c)) ** 2


def reach(alpha: Tensor | float) -> Tensor | float:
    """How far below the row's maximum the threshold can lie: there the maximum alone already weighs one."""
    return 1 / (alpha - 1)


def one_plus_sigmoid(a: Tensor) -> Tensor:
    return 1 + torch.sigmoid(a)


@register("entmax")
def entmax(alpha: float | None = None, init: float = 0.0) -> Weighted:
    """alpha: a fixed number > 1 (1.5 and 2 have their own fast forms); None: the input `alpha` (H,), > 1, learned by the layer
    as 1 + sigmoid(a) from a = init (alpha = 1.5)."""
    if alpha is None:
        spec = Input("alpha", "h", default=1.5, layer=Learned(init, one_plus_sigmoid))
        return Weighted(normalizer=RowLocal(tempered, shift="root", floor=reach, inputs=(spec,)))
    if alpha <= 1:
        raise RegardError(f"alpha={alpha}: expected a number above 1 (softmax is the limit at 1)")
    fixed = {1.5: tempered_half, 2.0: above}.get(alpha, bind(tempered, alpha=alpha))
    return Weighted(normalizer=RowLocal(fixed, shift="root", floor=1 / (alpha - 1)))


def entmax_weights(z: Tensor, alpha: Tensor | float = 1.5, dim: int = -1) -> Tensor:
    """The map itself along `dim`, differentiable in z and alpha (a number, or a tensor that broadcasts with z).

    alpha = 1.5 is solved exactly by sorting, 2 is sparsemax, others by bisection; alpha = 1 is not taken (use softmax).
    """
    z = z.movedim(dim, -1)
    alpha = torch.as_tensor(alpha, dtype=z.dtype, device=z.device)
    if bool((alpha <= 1).any()):
        raise RegardError(f"alpha goes down to {float(alpha.min())}; expected values above 1")
    with torch.no_grad():
        tau = sorted_half(z) if alpha.dim() == 0 and float(alpha) == 1.5 else bisected(z, alpha)
    gap = 1 / (alpha - 1)
    x = (alpha - 1) * z
    # One Newton step from the solved threshold carries its implicit derivative.
    p = (x - tau).clamp_min(0)
    slope = torch.where(p > 0, p.detach() ** (gap - 1), 0.0).mul(gap).sum(-1, keepdim=True).detach()
    tau = tau + ((safe_power(p, gap)).sum(-1, keepdim=True) - 1) / slope
    return safe_power((x - tau).clamp_min(0), gap).movedim(-1, dim)


def safe_power(p: Tensor, gap: Tensor) -> Tensor:
    """p ** gap with zero value and zero gradients at p = 0."""
    on = p > 0
    return torch.where(on, torch.where(on, p, 1.0) ** gap, 0.0)


def sorted_half(z: Tensor) -> Tensor:
    """The exact threshold of 1.5-entmax on z / 2."""
    ranked = (z / 2).sort(-1, descending=True).values
    rank = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    finite = torch.where(ranked.isfinite(), ranked, 0.0)
    mean, square = finite.cumsum(-1) / rank, finite.square().cumsum(-1) / rank
    spread = rank * (square - mean.square())
    tau = torch.where(ranked.isfinite(), mean - ((1 - spread) / rank).clamp_min(0).sqrt(), float("inf"))
    size = (tau <= ranked).sum(-1, keepdim=True)
    return tau.gather(-1, size - 1)


def bisected(z: Tensor, alpha: Tensor) -> Tensor:
    x = (alpha - 1) * z
    high = x.amax(-1, keepdim=True)
    low = high - 1
    for _ in range(80):
        middle = (low + high) / 2
        heavy = ((x - middle).clamp_min(0) ** (1 / (alpha - 1))).sum(-1, keepdim=True) >= 1
        low, high = torch.where(heavy, middle, low), torch.where(heavy, high, middle)
    return low
