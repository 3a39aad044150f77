"""Checks of lln-attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal, Padding, elu_plus_one
from regard.catalog import get
from regard.engine import step, weights
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.tasks.statistics import entropy, log_variance, spectral_gap
from regard.zoo.linear.lln_attention import fit


@check("lln-attention", "linear path with gradients == exp(alpha q).exp(beta k) over its row sums", below=1e-8, control="alpha = beta = 1")
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(64, 16))

    def truth(alpha: float, beta: float) -> Tensor:
        w = torch.exp(alpha * q) @ torch.exp(beta * k).mT
        return w / w.sum(-1, keepdim=True) @ v

    sq, sk = float(q.detach().std()), float(k.detach().std())
    t = math.sqrt((sq**2 * sk**2 + 0.35487039130661086) / (2 * 0.14855178144710912))
    out = attend(q, k, v, get("lln-attention", eps=0.0))
    return gap_with_gradients(out, truth(t / sq, t / sk), leaves), naive.gap(out, truth(1.0, 1.0))


@check(
    "lln-attention",
    "N(0, c^2), c in 1 .. 1.5: log of the log-variance of weights over softmax's, the worst",
    below=math.log(1.34),
    control="elu + 1",
)
def _() -> tuple[float, float]:
    def miss(name: str) -> float:
        worst = 0.0
        for c in (1.0, 1.2, 1.5):
            q, k = (c * torch.randn(1, 4, 256, 64, dtype=F64) for _ in range(2))
            own = weights(q, k, "lln-attention") if name == "lln" else elu_plus_one(q) @ elu_plus_one(k).mT
            worst = max(worst, abs(math.log(float(log_variance(own)) / float(log_variance(weights(q, k, "softmax"))))))  # type: ignore[arg-type]
        return worst

    return miss("lln"), miss("elu")


@check(
    "lln-attention",
    "entropy of rows: distance from softmax's in nats, falling in c; spectral gaps at hand",
    below=1.5,
    control="elu + 1 at c = 2",
)
def _() -> tuple[float, float]:
    own, soft, flat = [], [], 0.0
    for c in (1.0, 1.5, 2.0):
        q, k = (c * torch.randn(1, 4, 256, 64, dtype=F64) for _ in range(2))
        w = weights(q, k, "lln-attention")
        assert w is not None
        own.append(float(entropy(w).mean()))
        soft.append(float(entropy(weights(q, k, "softmax")).mean()))  # type: ignore[arg-type]
        flat = float(entropy(elu_plus_one(q) @ elu_plus_one(k).mT).mean()) - soft[-1]
        if not 0 < float(spectral_gap(w).min()) <= 1:
            return math.nan, math.nan
    falling = own[0] > own[1] > own[2]
    return max(abs(a - b) for a, b in zip(own, soft, strict=True)) if falling else math.nan, flat


@check(
    "lln-attention",
    "with diagonal: the mean of LLN and of softmax inside blocks; steps == chunks with given sigmas",
    below=1e-10,
    control="LLN alone",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(50, 16)
    i = torch.arange(50)
    s = (0.25 * q @ k.mT).masked_fill(i[:, None] // 16 != i // 16, float("-inf"))
    linear = attend(q, k, v, "lln-attention")
    out = attend(q, k, v, get("lln-attention", diagonal=True, block_size=16))
    given = get("lln-attention", statistics="given")
    sigmas = {"sigma_q": q.std(), "sigma_k": k.std()}
    whole, state, outs = attend(q, k, v, given, mask=Causal(), **sigmas), None, []
    for t in range(50):
        o, state = step(*[x[:, :, t : t + 1] for x in (q, k, v)], given, state, **sigmas)
        outs.append(o)
    decoded = max(naive.gap(torch.cat(outs, 2), whole), naive.gap(whole[:, :, -1], linear[:, :, -1]))
    return max(naive.gap(out, (linear + s.softmax(-1) @ v) / 2), decoded), naive.gap(out, linear)


@check("lln-attention", "a and b fitted at D = 64 give the paper's log-variance at t^2 = 4 within", below=0.25, control="fitted at D = 16")
def _() -> tuple[float, float]:
    def miss(d: int) -> float:
        a, b = fit(d)
        return abs(8 * a + b - (8 * 0.14855178144710912 - 0.35487039130661086))

    return miss(64), miss(16)


@check(
    "lln-attention",
    "given sigmas, a, b, eps and shift: exp(alpha q).exp(beta k) over its sum plus eps e^(shifts), causal, with gradients",
    below=1e-8,
    control="without eps",
)
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(20, 8))
    sigma_q, sigma_k, a, b = torch.tensor(0.7, dtype=F64), torch.tensor(1.3, dtype=F64), 0.2, -0.5
    t = math.sqrt(((0.7 * 1.3) ** 2 - b) / (2 * a))
    w = (torch.exp(t / 0.7 * q) @ torch.exp(t / 1.3 * k).mT).tril()
    shift_q = (t / 0.7 * q).amax(-1, keepdim=True)
    top = torch.tensor([[0.3, 1.1]], dtype=F64)
    running = (t / 1.3 * k).amax(-1, keepdim=True).cummax(-2).values
    given = {"sigma_q": sigma_q, "sigma_k": sigma_k}
    own, other = [], math.inf
    for kind, shift, more in (("running", running, {}), ("given", top[..., None, None], {"key_max": top})):
        truth = w @ v / (w.sum(-1, keepdim=True) + 0.5 * torch.exp(shift_q + shift))
        mechanism = get("lln-attention", statistics="given", a=a, b=b, eps=0.5, shift=kind)
        out = attend(q, k, v, mechanism, mask=Causal(), **given, **more)
        own.append(gap_with_gradients(out, truth, leaves) if kind == "given" else naive.gap(out, truth))
        other = min(other, naive.gap(out, w @ v / w.sum(-1, keepdim=True)))
    return max(own), other


@check(
    "lln-attention",
    "diagonal='channels': LLN and block softmax times a factor a channel each; padding: as without the padded tokens",
    below=1e-10,
    control="padding counted in sigma",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(24, 8)
    blend, i = torch.randn(2, 2, 8, dtype=F64), torch.arange(24)
    s = (q @ k.mT / math.sqrt(8)).masked_fill(i[:, None] // 6 != i // 6, -math.inf)
    mixed = attend(q, k, v, get("lln-attention", diagonal="channels", block_size=6), blend=blend)
    linear = attend(q, k, v, "lln-attention")
    own = naive.gap(mixed, blend[0, :, None] * linear + blend[1, :, None] * (s.softmax(-1) @ v))
    junk = [torch.cat((x, 5 * torch.randn(1, 2, 7, 8, dtype=F64)), 2) for x in (q, k, v)]
    keep = (torch.arange(31) < 24)[None]
    padded = attend(*junk, "lln-attention", mask=Padding(), keep=keep)[:, :, :24]  # type: ignore[misc]
    wide = junk[0].std(), junk[1].std()
    wrong = attend(*junk, get("lln-attention", statistics="given"), mask=Padding(), keep=keep, sigma_q=wide[0], sigma_k=wide[1])  # type: ignore[misc]
    return max(own, naive.gap(padded, linear)), naive.gap(wrong[:, :, :24], linear)
