"""alpha-entmax with a learned alpha per head (id 29; Correia et al., 2019).

p_i = relu((alpha - 1) s_i - tau_i)^(1 / (alpha - 1)),   tau_i such that the row sums to one; alpha = 1 + sigmoid(a_h)
"""

import torch
from torch import Tensor

from regard.algebra import Input, Learned, RowLocal, Weighted, bind
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.zoo.softmax.sparsemax import above

WIDEST = 50.0  # exp(-50) is below the rounding of a sum of one, so no root lies further from the row's maximum
FLAT = 0.1  # alpha - 1 below which weights are written as what they are beside e^(s - c)
NEAR, ORDER = 0.003, 6  # where log(1 + t) / t is a series, and how many terms make it exact to float64


def tempered(s: Tensor, c: Tensor, alpha: Tensor) -> Tensor:
    """((alpha - 1) (s - c))_+^(1 / (alpha - 1)), c = tau / (alpha - 1), whose threshold is exact; and, for alpha - 1 below FLAT, where that c
    grows without bound, (1 + (alpha - 1) (s - c))_+^(1 / (alpha - 1)), which tends to e^(s - c) at alpha = 1."""
    x, one = s - c, torch.ones_like(s)
    delta = (alpha - 1) * one
    t, flat = delta * x, delta < FLAT
    base = torch.where(flat, 1 + t, t)
    on = base > 0
    safe = torch.where(on, base, one)
    log = torch.log(safe) + torch.where(flat, (t - (base - 1)) / safe, 0.0 * one)  # what rounding 1 + t lost
    near = torch.where(flat, torch.abs(t), one) < NEAR
    inside = torch.where(near, t, 0.0 * one)
    series = inside * (-1 / ORDER) + 1 / (ORDER - 1)
    for n in range(ORDER - 2, 0, -1):
        series = 1 / n - inside * series
    power = torch.where(near, x * series, log * (1 / torch.where(delta > 0, delta, one)))
    return torch.where(on, torch.exp(power), 0.0 * one)


def tempered_half(s: Tensor, c: Tensor) -> Tensor:
    return torch.relu(0.5 * (s - c)) ** 2


def tempered_power(s: Tensor, c: Tensor, delta: float) -> Tensor:
    return torch.relu(delta * (s - c)) ** (1 / delta)


def reach(alpha: Tensor) -> Tensor:
    """How far below the row's maximum the root can lie; for flat weights, minus how far above."""
    delta = alpha - 1
    return torch.where(delta < FLAT, -1 / torch.clamp(delta, min=1 / WIDEST), 1 / torch.clamp(delta, min=1 / WIDEST))


def one_plus_sigmoid(a: Tensor) -> Tensor:
    return 1 + torch.sigmoid(a)


def chosen(a: Tensor, low: float, high: float) -> Tensor:
    return one_plus_sigmoid(a).clamp(low, high)


@register("entmax")
def entmax(alpha: float | None = None, init: float = 0.0, bounds: tuple[float, float] | None = None) -> Weighted:
    """alpha: a fixed number > 1 (1.5 and 2 have their own fast forms); None: the input `alpha` (H,), at least 1 (softmax), learned by the
    layer as 1 + sigmoid(a) from a = init (alpha = 1.5). bounds: what the layer's alpha is clamped to (the released chooser: 1.01, 2)."""
    if alpha is None:
        transform = one_plus_sigmoid if bounds is None else bind(chosen, low=float(bounds[0]), high=float(bounds[1]))
        spec = Input("alpha", "h", default=1.5, layer=Learned(init, transform), at_least=1.0)
        half = RowLocal(tempered_half, shift="root", floor=2.0)
        return Weighted(normalizer=RowLocal(tempered, shift="root", floor=reach, inputs=(spec,), usual=half))
    if alpha <= 1:
        raise RegardError(f"alpha={alpha}: expected a number above 1 (softmax is the limit at 1)")
    if alpha in (1.5, 2.0):
        return Weighted(normalizer=RowLocal({1.5: tempered_half, 2.0: above}[alpha], shift="root", floor=1 / (alpha - 1)))
    if alpha - 1 < FLAT:
        spec = Input("alpha", "h", default=alpha, layer=Learned(alpha, trainable=False), at_least=1.0)
        return Weighted(normalizer=RowLocal(tempered, shift="root", floor=reach, inputs=(spec,)))
    return Weighted(normalizer=RowLocal(bind(tempered_power, delta=alpha - 1), shift="root", floor=1 / (alpha - 1)))


def entmax_weights(z: Tensor, alpha: Tensor | float = 1.5, dim: int = -1) -> Tensor:
    """The map itself along `dim`, differentiable in z and alpha (a number, or a tensor that broadcasts with z), at least 1 (softmax).

    alpha = 1.5 is solved exactly by sorting, others by bisection. Entries of -inf weigh 0; a row of nothing else is zero.
    """
    z = z.movedim(dim, -1)
    alpha = torch.as_tensor(alpha, dtype=z.dtype, device=z.device)
    if bool((alpha < 1).any()):
        raise RegardError(f"alpha goes down to {float(alpha.min().detach())}; expected values of at least 1")
    seen = z > float("-inf")
    live = seen.any(-1, keepdim=True)
    top = torch.where(live, z.detach().amax(-1, keepdim=True), 0.0)
    s = torch.where(seen, z, top)
    with torch.no_grad():
        c = sorted_half(s, seen) if alpha.dim() == 0 and float(alpha) == 1.5 else bisected(s, seen, top, alpha)

    def weights(c: Tensor) -> Tensor:
        return torch.where(seen, tempered(s, c, alpha), 0.0)

    flat = alpha - 1 < FLAT
    for _ in range(2):  # Newton steps from the root carry its derivatives, the first the first, both the second
        w = weights(c)
        base = torch.where(flat, 1.0, 0.0) + (alpha - 1) * (s - c)
        slope = torch.where(w > 0, w / torch.where(w > 0, base, 1.0), 0.0).sum(-1, keepdim=True)
        c = c + torch.where(live, (w.sum(-1, keepdim=True) - 1) / torch.where(live, slope, 1.0), 0.0)
    p = weights(c)
    return (p / torch.where(live, p.detach().sum(-1, keepdim=True), 1.0)).movedim(-1, dim)


def safe_power(p: Tensor, gap: Tensor) -> Tensor:
    """p ** gap with zero value and zero gradients at p = 0."""
    on = p > 0
    return torch.where(on, torch.where(on, p, 1.0) ** gap, 0.0)


def sorted_half(s: Tensor, seen: Tensor) -> Tensor:
    """The exact c = 2 tau of 1.5-entmax: tau from sums over the largest entries of s / 2."""
    ranked = (s / 2).masked_fill(~seen, float("-inf")).sort(-1, descending=True).values
    rank = torch.arange(1, s.shape[-1] + 1, device=s.device, dtype=s.dtype)
    there = ranked.isfinite()
    finite = torch.where(there, ranked - ranked[..., :1].nan_to_num(neginf=0.0), 0.0)  # from the maximum, so that squares do not cancel
    mean, square = finite.cumsum(-1) / rank, finite.square().cumsum(-1) / rank
    spread = rank * (square - mean.square())
    tau = torch.where(there, mean - ((1 - spread) / rank).clamp_min(0).sqrt(), float("inf"))
    size = (there & (tau <= finite)).sum(-1, keepdim=True).clamp_min(1)
    return 2 * tau.gather(-1, size - 1).nan_to_num(posinf=0.0) + s.amax(-1, keepdim=True)


def bisected(s: Tensor, seen: Tensor, top: Tensor, alpha: Tensor) -> Tensor:
    span = reach(alpha)
    low, high = top - span.clamp_min(0), top - span.clamp_max(0)
    for _ in range(80):
        middle = (low + high) / 2
        heavy = torch.where(seen, tempered(s, middle, alpha), 0.0).sum(-1, keepdim=True) >= 1
        low, high = torch.where(heavy, middle, low), torch.where(heavy, high, middle)
    return low
