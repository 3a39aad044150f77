"""Checks of findings about softmax: limits of normalization, softmax as recurrences, shaped attention, the locality dial."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...algebra import Causal
from ...catalog import get
from ...engine import attend, weights
from ...mechanisms.recurrent.softmax_as_rnn import stabilised, taylor_recurrent_attention
from ...nn import Attention
from .. import naive
from ..experiments import limits, localist, shaped
from ..verification import check
from .weighted import qkv

F64 = torch.float64


@check(
    "normalization-limits",
    "logits in [-1, 1]: L max(alpha) from L = 64 to 32768, largest over smallest, all weights in softmax's bounds",
    below=1.1,
    control="Scalable-Softmax, whose F depends on L",
)
def _() -> tuple[float, float]:
    def ratio(name: str) -> float:
        found = []
        for length in (64, 512, 4096, 32768):
            s = 2 * torch.rand(4, length, dtype=F64) - 1
            s[:, 0] = 1.0  # the largest possible logit, so that luck has no part in small samples
            w = s.softmax(-1) if name == "softmax" else (s * 0.43 * math.log(length)).softmax(-1)
            low, high = limits.dispersion_bounds(1.0, length)
            if name == "softmax" and not bool(((w >= low) & (w <= high)).all()):
                return math.inf
            found.append(length * float(w.max(-1).values.mean()))
        return max(found) / min(found)

    return ratio("softmax"), ratio("ssmax")


@check(
    "normalization-limits",
    "Jacobian at T = 0.5, 1, 2: norm within 1 / (2 T) and equal to (diag a - a a^T) / T",
    below=1e-10,
    control="the closed form without 1 / T",
)
def _() -> tuple[float, float]:
    gaps, others = [], []
    for t in (0.5, 1.0, 2.0):
        s = 2 * torch.randn(24, dtype=F64)
        found = limits.attention_limits(s, temperature=t)
        a = (s / t).softmax(-1)
        closed = limits.softmax_jacobian(a, t)
        own = torch.autograd.functional.jacobian(lambda x, t=t: limits.normalised(x, "softmax", t), s)
        gaps.append(
            naive.gap(own, closed)
            + abs(found.jacobian - float(torch.linalg.matrix_norm(closed, 2)))
            + max(0.0, found.jacobian - found.jacobian_bound)
        )
        others.append(naive.gap(own, t * closed))
    return max(gaps), max(others)


@check(
    "normalization-limits",
    "separation d~ of the top N stays under its bound and equals loops, softmax and a user's F",
    below=1e-10,
    control="tokens without their weights",
)
def _() -> tuple[float, float]:
    own, other = 0.0, 0.0
    normalizers: tuple[str | Callable[[Tensor], Tensor], ...] = ("softmax", lambda x: 1 + x * x)
    for normalizer in normalizers:
        s, x = torch.randn(40, dtype=F64), torch.randn(40, 8, dtype=F64)
        found = limits.attention_limits(s, x, normalizer, tops=(3, 10), jacobian=False)
        a = limits.normalised(s, normalizer, 1.0)
        for n, d, bound in zip(found.tops, found.separation, found.separation_bound, strict=True):
            top = a.argsort(descending=True)[:n].tolist()
            centre = sum((a[i] * x[i] for i in top), torch.zeros(8, dtype=F64))
            loops = sum(float((centre - a[j] * x[j]).norm()) for j in range(40) if j not in top)
            bare = sum(float((x[top].sum(0) - x[j]).norm()) for j in range(40) if j not in top)
            own, other = max(own, abs(d - loops) + max(0.0, d - bound)), max(other, abs(d - bare))
    return own, other


@check(
    "normalization-limits",
    "selecting all but one token: d~ over that of selecting a tenth falls towards 0",
    below=0.1,
    control="selecting a fifth",
)
def _() -> tuple[float, float]:
    found = limits.attention_limits(torch.randn(200, dtype=F64), tops=(20, 40, 199), jacobian=False)
    return found.separation[2] / found.separation[0], found.separation[1] / found.separation[0]


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
    "errors at orders 1, 2, 4, 8, 12 fall strictly and stay under 10 / (N + 1)!: largest ratio to that bound",
    below=1.0,
    control="softmax under every order's name",
)
def _() -> tuple[float, float]:
    q, k, v = small_scores()
    truth = attend(q, k, v, mask=Causal())

    def worst(found: list[float]) -> float:
        falling = all(b < a for a, b in itertools.pairwise(found))
        return max(e * math.factorial(n + 1) / 10 for e, n in zip(found, (1, 2, 4, 8, 12), strict=True)) if falling else math.inf

    own = worst([naive.gap(taylor_recurrent_attention(q, k, v, n), truth) for n in (1, 2, 4, 8, 12)])
    return own, worst([naive.gap(attend(q, k, v, mask=Causal()), truth) for _ in range(5)])


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
    "shaped-transformer", "weights == I + softmax(Y / (tau0 sqrt(n))) - 1 / m, full and causal", below=1e-12, control="without the centring"
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(13)
    mechanism = get("shaped-transformer", width=64, tau0=1.5)
    own, other = 0.0, 0.0
    for causal in (False, True):
        seen = torch.ones(13, 13, dtype=torch.bool).tril() if causal else torch.ones(13, 13, dtype=torch.bool)
        w = weights(q, k, mechanism, mask=Causal() if causal else None)
        s = (q @ k.transpose(-1, -2) / (math.sqrt(8) * 1.5 * 8)).masked_fill(~seen, -torch.inf).softmax(-1)
        even = seen.double() / seen.sum(-1, keepdim=True)
        assert w is not None
        own, other = max(own, naive.gap(w, torch.eye(13) + s - even)), max(other, naive.gap(w, torch.eye(13) + s))
    return own, other


@check(
    "shaped-transformer",
    "n = 128, 4000 antithetic draws of a layer: relative error of n (E[V'] - V) against the drift b(V)",
    below=0.15,
    control="the drift of softmax layers",
)
def _() -> tuple[float, float]:
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(5), dtype=F64)
    x[1] = 0.6 * x[0] + 0.8 * x[1]
    b = shaped.drift(shaped.covariance(x))
    off = [float((shaped.measured_drift(x, shaped.Layer(kind=kind), 4000) - b).norm() / b.norm()) for kind in ("shaped", "softmax")]
    return off[0], off[1]


@check(
    "shaped-transformer", "64 layers, width 128, 8 tokens: mean |cos| between tokens", below=0.75, control="softmax with the same residual"
)
def _() -> tuple[float, float]:
    return shaped.token_cosine("shaped"), shaped.token_cosine("softmax")


def blocks_with_margin(delta: float) -> tuple[Tensor, Tensor]:
    """Weights and inside (12, 60) of random logits whose inside exceeds outside by at least delta."""
    inside = torch.zeros(12, 60, dtype=torch.bool)
    inside[:, :10] = True
    s = torch.randn(12, 60, dtype=F64)
    low_in, high_out = s[:, :10].amin(1, keepdim=True), s[:, 10:].amax(1, keepdim=True)
    s[:, :10] += (high_out - low_in + delta).clamp_min(0)
    return s.softmax(-1), inside


@check(
    "localist-dial",
    "margins 1, 3, 6: leak and entropy over their bounds, largest over rows",
    below=1.0,
    control="logits whose margin is one less",
)
def _() -> tuple[float, float]:
    def worst(less: float) -> float:
        found = []
        for delta in (1.0, 3.0, 6.0):
            w, inside = blocks_with_margin(delta)
            if less:  # all inside equal and all outside equal, at a smaller margin than is claimed
                w = torch.where(inside, delta - less, 0.0).double().softmax(-1)
            leaked = localist.leak(w, inside)
            entropy = -torch.special.xlogy(w, w).sum(-1)
            found += [(leaked / localist.leak_bound(inside, delta)).max(), (entropy / localist.entropy_bound(inside, leaked)).max()]
        return float(torch.stack(found).max()) - 1e-12

    return worst(0.0), worst(1.0)


@check("localist-dial", "dial 0 == plain attention, leak falls as it turns, and is < 1e-6 at 1 - 1e-12", below=1e-6, control="dial 0.9")
def _() -> tuple[float, float]:
    q, k, v = qkv(24)
    block = (torch.arange(24) // 6).double()[None]
    inside = block[0, :, None] == block[0, None]

    def leaked(dial: float) -> float:
        w = weights(q, k, "localist-dial", query_block=block, key_block=block, dial=torch.full((1, 1, 1), dial, dtype=F64))
        assert w is not None
        return float(localist.leak(w, inside).max())

    turns = [leaked(x) for x in (0.0, 0.3, 0.6, 0.9)]
    falling = all(b < a for a, b in itertools.pairwise(turns))
    free = naive.gap(attend(q, k, v, "localist-dial", query_block=block, key_block=block), attend(q, k, v))
    return max(leaked(1 - 1e-12), free) if falling and leaked(1.0) == 0 else math.inf, leaked(0.9)


@check(
    "localist-dial",
    "group lasso, one relevant block of four: relative gap of the observed critical lambda to |grad at 0| / w_b",
    below=0.05,
    control="the gradient without its weight",
)
def _() -> tuple[float, float]:
    torch.manual_seed(1)
    x, truth = torch.randn(200, 16, dtype=F64), torch.zeros(16, dtype=F64)
    truth[:4] = torch.tensor([1.0, -0.5, 0.8, 0.3], dtype=F64)
    y = x @ truth + 0.1 * torch.randn(200, dtype=F64)

    def loss(groups: list[Tensor]) -> Tensor:
        return ((x @ torch.cat(groups) - y) ** 2).mean() / 2

    def zeroed(strength: float) -> list[bool]:
        groups = [torch.full((4,), 0.1, dtype=F64, requires_grad=True) for _ in range(4)]
        for _ in range(400):
            grads = torch.autograd.grad(loss(groups), groups)
            with torch.no_grad():
                for w, g in zip(groups, grads, strict=True):
                    w -= 0.2 * g
            localist.proximal_step([w.data for w in groups], 0.2, strength)
        return [float(w.detach().norm()) == 0 for w in groups]

    empty = [torch.zeros(4, dtype=F64, requires_grad=True) for _ in range(4)]
    gradient = torch.autograd.grad(loss(empty), empty)[0]
    predicted = localist.critical_strength(gradient)
    low, high = 0.0, 4 * predicted
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if zeroed(middle)[0] else (middle, high)
    sparse = zeroed(predicted / 2) == [False, True, True, True]
    return abs(high / predicted - 1) if sparse else math.inf, abs(high / float(gradient.norm()) - 1)
