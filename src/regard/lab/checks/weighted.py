"""Checks of the weighted rows: sigmoid, softpick, ssmax, cog, qknorm, inverse distance, ReLU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...algebra import Alibi, Causal, Mechanism, Rope, RowWise, Weighted
from ...catalog import get
from ...engine import attend, attend_with_stats, merge
from ...mechanisms.weighted.qknorm import g0_from_lengths
from ...mechanisms.weighted.softpick import softpick_weights
from .. import naive
from ..experiments.sinks import trained
from ..verification import check

F64 = torch.float64


def qkv(n: int = 37, d: int = 8, heads: int = 2, std: float = 1.0, m: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(std * torch.randn(1, heads, length, d, dtype=F64) for length in (n, m or n, m or n))  # type: ignore[return-value]


def identity_values(n: int, heads: int = 1) -> Tensor:
    """Values that make the output the weights themselves."""
    return torch.eye(n, dtype=F64).expand(1, heads, n, n)


def weights_of(s: Tensor, mechanism: str | Mechanism, mask: Causal | None = None, **inputs: Tensor) -> Tensor:
    """Weights of given scores (n, m): q carries the scores, k and v are identities."""
    m = s.shape[1]
    found = get(mechanism) if isinstance(mechanism, str) else mechanism
    executor = "rows" if isinstance(getattr(found, "normalizer", None), RowWise) else "tiled"
    return attend(s[None, None], identity_values(m), identity_values(m), found, scale=1.0, mask=mask, executor=executor, **inputs)[0, 0]


@check("sigmoid", "tiled == sigmoid(q.k/sqrt(d) + b) v, causal, n = 37", below=1e-10, control="softmax in its place")
def _() -> tuple[float, float]:
    q, k, v = qkv()
    truth = naive.attention(q, k, v, lambda s: 1 / (1 + torch.exp(-(s - 1.5))), naive.causal)
    return (
        naive.gap(attend(q, k, v, get("sigmoid", bias=-1.5), mask=Causal()), truth),
        naive.gap(attend(q, k, v, "softmax", mask=Causal()), truth),
    )


@check(
    "sigmoid",
    "gradients with ALiBi, causal, equal those of the formula written out",
    below=1e-10,
    control="without ALiBi",
)
def _() -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in qkv(19))
    slopes = torch.tensor([2.0**-4, 2.0**-8], dtype=F64)
    gap = (torch.arange(19)[:, None] - torch.arange(19)).clamp_min(0)
    s = q @ k.transpose(-1, -2) / math.sqrt(8) - slopes[:, None, None] * gap - math.log(19)
    truth = torch.autograd.grad(((torch.sigmoid(s) * torch.ones(19, 19, dtype=F64).tril()) @ v).square().sum(), (q, k, v))
    bias = torch.full((2,), -math.log(19), dtype=F64)
    gaps = []
    for position in (Alibi(), None):
        out = attend(q, k, v, get("sigmoid", position=position), mask=Causal(), bias=bias)
        gaps.append(max(naive.gap(a, b) for a, b in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), truth, strict=True)))
    return gaps[0], gaps[1]


@check("sigmoid", "attention over keys [0:m] plus over [m:n] is the full call", below=1e-12, control="softmax parts added")
def _() -> tuple[float, float]:
    q, k, v = qkv()

    def split(mechanism: Mechanism) -> float:
        parts = attend(q, k[:, :, :15], v[:, :, :15], mechanism) + attend(q, k[:, :, 15:], v[:, :, 15:], mechanism)
        return naive.gap(parts, attend(q, k, v, mechanism))

    return split(get("sigmoid", bias=-3.6)), split(get("softmax"))


@check("sigmoid", "with b = -log n row sums stay near e^0.5 for n = 64..4096", below=2.0, control="b = 0")
def _() -> tuple[float, float]:
    def largest(bias: float | None) -> float:
        sums = []
        for n in (64, 512, 4096):
            q = torch.randn(1, 1, 64, 64, dtype=F64)
            k = torch.randn(1, 1, n, 64, dtype=F64)
            sums.append(float(attend(q, k, torch.ones(1, 1, n, 1, dtype=F64), get("sigmoid", bias=bias)).mean()))
        return max(sums) if min(sums) >= 0.9 else math.inf

    return largest(None), largest(0.0)


@check("softpick", "tiles == relu(e^s - 1) / sum|e^s - 1|, causal, n = 77, logits N(0, 3)", below=1e-10, control="softmax in its place")
def _() -> tuple[float, float]:
    q, k, v = qkv(77, std=1.7)

    def row(s: Tensor) -> Tensor:
        rise = torch.exp(s) - 1
        return rise.clamp_min(0) / (rise.abs().sum() + 1e-8 * torch.exp(s.max().clamp_min(0)))

    truth = naive.attention(q, k, v, row, naive.causal)
    return naive.gap(attend(q, k, v, "softpick", mask=Causal()), truth), naive.gap(attend(q, k, v, "softmax", mask=Causal()), truth)


@check("softpick", "row sum is P / (P + N)", below=1e-12, control="softmax rows")
def _() -> tuple[float, float]:
    s = 3 * torch.randn(20, 40, dtype=F64)
    rise = torch.exp(s) - 1
    p, n = rise.clamp_min(0).sum(-1), (-rise).clamp_min(0).sum(-1)
    return naive.gap(weights_of(s, get("softpick", eps=0.0)).sum(-1), p / (p + n)), naive.gap(weights_of(s, "softmax").sum(-1), p / (p + n))


@check("softpick", "adding 1 to every logit changes the weights", above=1e-3, control="softmax, which is shift invariant")
def _() -> tuple[float, float]:
    s = torch.randn(20, 40, dtype=F64)
    return (
        naive.gap(weights_of(s + 1, "softpick"), weights_of(s, "softpick")),
        naive.gap(weights_of(s + 1, "softmax"), weights_of(s, "softmax")),
    )


@check("softpick", "rows of logits -500 give exact zeros and finite gradients in float32", below=0.0, control="softmax rows")
def _() -> tuple[float, float]:
    def total(mechanism: str) -> float:
        q = torch.full((1, 1, 8, 4), -250.0, requires_grad=True)
        k, v = torch.full((1, 1, 8, 4), 1.0), torch.ones(1, 1, 8, 3)
        out = attend(q, k, v, mechanism, executor="tiled")
        (grad,) = torch.autograd.grad(out.sum(), q)
        return float(out.detach().abs().sum() + grad.abs().sum()) if bool(grad.isfinite().all()) else math.inf

    return total("softpick"), total("softmax")


@check("softpick", "the function's gradient equals finite differences", below=1e-6, control="gradient of softmax")
def _() -> tuple[float, float]:
    x = torch.randn(12, dtype=F64, requires_grad=True)
    seed = torch.randn(12, dtype=F64)
    eye = 1e-6 * torch.eye(12, dtype=F64)
    numeric = ((softpick_weights(x.detach() + eye) - softpick_weights(x.detach() - eye)) @ seed) / 2e-6
    (own,) = torch.autograd.grad(softpick_weights(x) @ seed, x)
    (other,) = torch.autograd.grad(x.softmax(-1) @ seed, x)
    return naive.gap(own, numeric), naive.gap(other, numeric)


@check(
    "ssmax", "weight of z = [3, 0, ...] is n^{sg} / (n^{sg} + n - 1), s = 0.43, for n = 10^2..10^6", below=1e-12, control="plain softmax"
)
def _() -> tuple[float, float]:
    gaps: list[float] = []
    others: list[float] = []
    for n in (100, 10_000, 1_000_000):
        k = torch.zeros(1, 1, n, 1, dtype=F64)
        k[0, 0, 0, 0] = 3.0
        truth = n ** (0.43 * 3) / (n ** (0.43 * 3) + n - 1)
        q = torch.ones(1, 1, 1, 1, dtype=F64)
        for mechanism, into in (("ssmax", gaps), ("softmax", others)):
            into.append(abs(float(attend(q, k, (k > 0).to(F64), mechanism, scale=1.0)) - truth))
    return max(gaps), max(others)


@check(
    "ssmax",
    "causal rows use their own n: q-scaling equals the row formula, and decode equals prefill",
    below=1e-10,
    control="a global log L",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(23)
    truth = naive.attention(q, k, v, lambda s: naive.softmax(s * (0.43 * math.log(len(s)))), naive.causal)
    whole = attend(q, k, v, "ssmax", mask=Causal())
    last = attend(q[:, :, -1:], k, v, "ssmax", mask=Causal())
    fixed = attend(q * 0.43 * math.log(23), k, v, "softmax", mask=Causal())
    return max(naive.gap(whole, truth), naive.gap(last, truth[:, :, -1:])), naive.gap(fixed, truth)


@check("ssmax", "a gap g below 1/s still fades: weight at n = 10^6 with g = 1", below=0.05, control="g = 3 > 1/s")
def _() -> tuple[float, float]:
    def weight(g: float) -> float:
        k = torch.zeros(1, 1, 1_000_000, 1, dtype=F64)
        k[0, 0, 0, 0] = g
        return float(attend(torch.ones(1, 1, 1, 1, dtype=F64), k, (k > 0).to(F64), "ssmax", scale=1.0))

    return weight(1.0), weight(3.0)


@check("cog-attention", "tiles == sign(s) e^|s| / sum e^|s|, causal", below=1e-10, control="softmax in its place")
def _() -> tuple[float, float]:
    q, k, v = qkv(53, std=1.5)
    truth = naive.attention(q, k, v, lambda s: torch.sign(s) * naive.softmax(s.abs()), naive.causal)
    return naive.gap(attend(q, k, v, "cog-attention", mask=Causal()), truth), naive.gap(attend(q, k, v, "softmax", mask=Causal()), truth)


@check("cog-attention", "f(-q, k, v) == -f(q, k, v)", below=1e-12, control="softmax")
def _() -> tuple[float, float]:
    q, k, v = qkv()
    return (
        naive.gap(attend(-q, k, v, "cog-attention"), -attend(q, k, v, "cog-attention")),
        naive.gap(attend(-q, k, v, "softmax"), -attend(q, k, v, "softmax")),
    )


@check("cog-attention", "sum_j |p_ij| = 1, while signed sums leave [0.99, 1]", below=1e-12, control="the signed sum")
def _() -> tuple[float, float]:
    p = weights_of(torch.randn(30, 40, dtype=F64), "cog-attention")
    one = torch.ones(30, dtype=F64)
    return naive.gap(p.abs().sum(-1), one), naive.gap(p.sum(-1), one)


@check("cog-attention", "one head deletes: q = 6 sqrt(d) (k_1 - k_2) reads (v_1 - v_2) / 2 within 2%", below=0.02, control="softmax")
def _() -> tuple[float, float]:
    k = torch.linalg.qr(torch.randn(8, 8, dtype=F64))[0][None, None]
    v = torch.randn(1, 1, 8, 8, dtype=F64)
    q = 6 * math.sqrt(8) * (k[:, :, :1] - k[:, :, 1:2])
    truth = (v[:, :, :1] - v[:, :, 1:2]) / 2
    size = float(truth.abs().max())
    return naive.gap(attend(q, k, v, "cog-attention"), truth) / size, naive.gap(attend(q, k, v, "softmax"), truth) / size


@check("qknorm", "output does not change when any q_i is scaled by 1e3 or any k_j by 1e-3", below=1e-9, control="scaled dot product")
def _() -> tuple[float, float]:
    q, k, v = qkv()
    a, c = torch.ones(1, 1, 37, 1, dtype=F64), torch.ones(1, 1, 37, 1, dtype=F64)
    a[:, :, 5], c[:, :, 9] = 1e3, 1e-3
    g = torch.full((2,), 7.0, dtype=F64)
    own = naive.gap(
        attend(q * a, k * c, v, get("qknorm", eps=1e-12), temperature=g), attend(q, k, v, get("qknorm", eps=1e-12), temperature=g)
    )
    return own, naive.gap(attend(q * a, k * c, v, "softmax"), attend(q, k, v, "softmax"))


@check("qknorm", "equals softmax(g cos(q, k)), causal, with rotary positions after it", below=1e-10, control="scaled dot product")
def _() -> tuple[float, float]:
    q, k, v = qkv(29)
    truth = naive.attention(q, k, v, naive.softmax, naive.causal, score=lambda a, c: 7 * (a @ c) / (a.norm() * c.norm()))
    own = attend(q, k, v, "qknorm", mask=Causal(), temperature=torch.full((2,), 7.0, dtype=F64))
    at = torch.arange(29)
    turned = naive.gap(Rope().rotate(q, at).norm(dim=-1), q.norm(dim=-1))
    return max(naive.gap(own, truth), turned), naive.gap(attend(q, k, v, "softmax", mask=Causal()), truth)


@check("qknorm", "g0 for constant length 100 is log2(9900) = 13.2732", below=1e-4, control="log2(100)")
def _() -> tuple[float, float]:
    return abs(g0_from_lengths([100] * 50) - math.log2(9900)), abs(math.log2(100) - math.log2(9900))


@check("idw-attention", "softmax(-log d) == (1/d) / sum 1/d, d = eps + |q - k|^2", below=1e-12, control="negative distance")
def _() -> tuple[float, float]:
    q, k, v = qkv(21)
    k[:, :, 3] = q[:, :, 4]  # a key on top of a query
    truth = naive.attention(q, k, v, lambda d: (1 / d) / (1 / d).sum(), score=lambda a, c: 1e-3 + ((a - c) ** 2).sum())
    return naive.gap(attend(q, k, v, "idw-attention"), truth), naive.gap(attend(q, k, v, get("idw-attention", link="negative")), truth)


@check("idw-attention", "as eps -> 0 a query on a key reads that key's value", below=1e-6, control="dot-product attention")
def _() -> tuple[float, float]:
    _, k, v = qkv(21)
    return naive.gap(attend(k, k, v, get("idw-attention", eps=1e-9)), v), naive.gap(attend(k, k, v, "softmax"), v)


@check(
    "softpick",
    "share of heads with a sink on the first token, after learning bigrams and copies (accuracy >= 0.95)",
    below=0.05,
    control="softmax",
)
def _() -> tuple[float, float]:
    own, other = trained("softpick"), trained("softmax")
    return own.sink_rate if own.accuracy >= 0.95 else math.inf, other.sink_rate


@check("relu", "equals L^-alpha relu(q.k/sqrt(d)) v, and its causal form with L = i, for every phi", below=1e-12, control="alpha = 0")
def _() -> tuple[float, float]:
    q, k, v = qkv(26)
    phis = {
        "relu": torch.relu,
        "relu2": lambda s: torch.relu(s) ** 2,
        "softplus": lambda s: torch.log1p(torch.exp(s)),
        "identity": lambda s: s,
    }
    own, other = 0.0, 0.0
    for name, phi in phis.items():
        truth = naive.attention(q, k, v, lambda s, phi=phi: phi(s) / len(s), naive.causal)  # type: ignore[misc]
        own = max(own, naive.gap(attend(q, k, v, get("relu", phi=name), mask=Causal()), truth))
        other = max(other, naive.gap(attend(q, k, v, get("relu", phi=name, alpha=0.0), mask=Causal()), truth))
    return own, other


@check("relu", "three key shards merge to the full output", below=1e-12, control="shards averaged by softmax's rule")
def _() -> tuple[float, float]:
    q, k, v = qkv(33)
    mechanism = get("relu")
    assert isinstance(mechanism, Weighted)
    cuts = [(0, 9), (9, 20), (20, 33)]
    parts = [attend_with_stats(q, k[:, :, a:c], v[:, :, a:c], mechanism) for a, c in cuts]
    truth = attend(q, k, v, mechanism)
    return naive.gap(merge(mechanism, parts)[0], truth), naive.gap(torch.stack([out for out, _ in parts]).sum(0), truth)


@check("relu", "mean row sum at unit-variance logits is 1/sqrt(2 pi) within 3% for L = 64..4096", below=0.03, control="alpha = 0")
def _() -> tuple[float, float]:
    def off(alpha: float) -> float:
        worst = 0.0
        for n in (64, 256, 1024, 4096):
            q, k = torch.randn(1, 8, 256, 64), torch.randn(1, 8, n, 64)
            mean = float(attend(q, k, torch.ones(1, 8, n, 1), get("relu", alpha=alpha)).mean())
            worst = max(worst, abs(mean * math.sqrt(2 * math.pi) - 1))
        return worst

    return off(1.0), off(0.0)
