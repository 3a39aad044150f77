"""Checks of the rows that are a feature map: cosFormer, Performer, Hedgehog, Based."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...algebra import Causal, Recurrent, Sizes
from ...algebra.feature_map import mapped, orthogonal_gaussian, positive_random, taylor, taylor_packed
from ...catalog import get
from ...engine import attend, step
from ...mechanisms.recurrent.hedgehog import distillation_loss
from .. import naive
from ..verification import check
from .recurrent import forms, qkv

F64 = torch.float64


def cosine_matrix(q: Tensor, k: Tensor, horizon: float, width: float = math.pi / 2) -> Tensor:
    i, j = torch.arange(q.shape[-2], dtype=F64)[:, None], torch.arange(k.shape[-2], dtype=F64)
    return (q.relu() @ k.relu().transpose(-1, -2)) * torch.cos(width * (i - j) / horizon)


def normalised(a: Tensor, v: Tensor) -> Tensor:
    return (a @ v) / a.sum(-1, keepdim=True).clamp_min(1e-6)


@check(
    "cosformer",
    "linear path == explicit relu x cosine matrix: bidirectional, causal, cross 20 x 33",
    below=1e-10,
    control="cos(i - j), no pi/2m",
)
def _() -> tuple[float, float]:
    own = other = 0.0
    for n, m, mask in ((40, 40, None), (40, 40, Causal()), (20, 33, None)):
        q, k, v = qkv(n, m=m)
        horizon = float(max(n, m))
        a, wrong = cosine_matrix(q, k, horizon), cosine_matrix(q, k, 1.0, 1.0)
        if mask:
            a, wrong = a.tril(), wrong.tril()
        out = attend(q, k, v, "cosformer", mask=mask)
        own, other = max(own, naive.gap(out, normalised(a, v))), max(other, naive.gap(out, normalised(wrong, v)))
    return own, other


@check("cosformer", "weights are never negative when m = max(Lq, Lk), Lq = 20, Lk = 33", above=-1e-15, control="m = 5")
def _() -> tuple[float, float]:
    q, k, _ = qkv(20, m=33)
    return float(cosine_matrix(q, k, 33.0).min()), float(cosine_matrix(q, k, 5.0).min())


@check("cosformer", "the recurrence with fixed m gives the parallel output token by token", below=1e-10, control="m re-set at every step")
def _() -> tuple[float, float]:
    q, k, v = qkv()
    whole = attend(q, k, v, "cosformer", mask=Causal())
    outs, drifting = [], []
    state = drift = None
    for t in range(40):
        piece = [x[:, :, t : t + 1] for x in (q, k, v)]
        out, state = step(*piece, "cosformer", state, horizon=40.0)
        outs.append(out)
        out, drift = step(*piece, "cosformer", drift, horizon=float(t + 1))
        drifting.append(out)
    return naive.gap(torch.cat(outs, 2), whole), naive.gap(torch.cat(drifting, 2), whole)


@check("cosformer", "m = 1e9 is plain ReLU linear attention", below=1e-6, control="m = 40")
def _() -> tuple[float, float]:
    q, k, v = qkv()
    plain = normalised(q.relu() @ k.relu().transpose(-1, -2), v)
    return naive.gap(attend(q, k, v, get("cosformer", horizon=1e9)), plain), naive.gap(attend(q, k, v, "cosformer"), plain)


def feature_error(m: int, copies: int = 1) -> float:
    """Mean relative Frobenius error of the estimated softmax kernel on 64 x 16 inputs of std 0.5, scaled by D^(-1/4).

    copies: how often the same m features are used, in place of new ones.
    """
    errors = []
    for seed in range(24):
        generator = torch.Generator().manual_seed(1000 + seed)
        x, y = (0.5 * 16**-0.25 * torch.randn(64, 16, generator=generator, dtype=F64) for _ in range(2))
        truth = torch.exp(x @ y.T)
        w = orthogonal_gaussian(Sizes(1, 1, 1, 1, 1, 16, 16), m, seed=seed).to(F64).repeat(copies, 1)
        phi = [positive_random(z, w, 0.0, False) for z in (x, y)]
        errors.append(float((phi[0] @ phi[1].T - truth).norm() / truth.norm()))
    return sum(errors) / len(errors)


@check(
    "performer",
    "the kernel's error falls with every fourfold m from 16: err(1024) / err(64)",
    below=0.45,
    control="16 copies of the 64 features",
)
def _() -> tuple[float, float]:
    errors = {m: feature_error(m) for m in (16, 64, 256, 1024)}
    falling = errors[16] > errors[64] > errors[256] > errors[1024]
    return errors[1024] / errors[64] if falling else math.inf, feature_error(64, 16) / errors[64]


@check(
    "performer",
    "orthogonal features are unbiased: |mean / truth - 1| over 6000 draws of 8 features",
    below=0.015,
    control="QR without the sign fix",
)
def _() -> tuple[float, float]:
    draws = torch.stack([orthogonal_gaussian(Sizes(1, 1, 1, 1, 1, 8, 8), 8, seed=seed) for seed in range(6000)]).to(F64)
    x, y = torch.zeros(8, dtype=F64), torch.zeros(8, dtype=F64)
    x[0], y[0], y[1] = 0.9, 0.9 * math.cos(0.4), 0.9 * math.sin(0.4)
    shape = positive_random(torch.stack((x, y)), draws.flatten(0, 1), 0.0, False) * math.sqrt(6000 * 8)
    own = float((shape[0] * shape[1]).mean() / torch.exp(x @ y))
    turn, _ = torch.linalg.qr(torch.randn(6000, 8, 8, dtype=F64))
    w = (turn * torch.randn(6000, 8, 8, dtype=F64).norm(dim=-1, keepdim=True)).flatten(0, 1)
    skew = positive_random(torch.stack((x, y)), w, 0.0, False) * math.sqrt(6000 * 8)
    return abs(own - 1), abs(float((skew[0] * skew[1]).mean() / torch.exp(x @ y)) - 1)


@check("performer", "iid features' squared error over its closed form, |log ratio|", below=0.15, control="without exp(-|x|^2/2)")
def _() -> tuple[float, float]:
    d = m = 8
    x, y = (F.normalize(torch.randn(d, dtype=F64), dim=0) * 0.9 for _ in range(2))
    w = torch.randn(40_000, m, d, dtype=F64)
    truth = float(torch.exp(x @ y))
    total = float((x + y).square().sum())
    closed = math.exp(total) * truth**2 * (1 - math.exp(-total)) / m

    def squared(damping: float) -> float:
        estimate = (torch.exp(w @ x - damping * 0.405) * torch.exp(w @ y - damping * 0.405)).mean(-1)
        return float((estimate - truth).square().mean())

    return abs(math.log(squared(1.0) / closed)), abs(math.log(squared(0.0) / closed))


@check("performer", "the mechanism approaches softmax attention: relative error with m = 4096", below=0.25, control="m = 16")
def _() -> tuple[float, float]:
    q, k, v = (0.7 * x for x in qkv(48, 16, 16))
    truth = attend(q, k, v, "softmax")
    size = float(truth.abs().mean())
    errors = [float((attend(q, k, v, get("performer", features=m)) - truth).abs().mean()) / size for m in (4096, 16)]
    return errors[0], errors[1]


@check("performer", "share of negative estimated weights (inputs of std 0.7)", below=0.0, control="trigonometric features")
def _() -> tuple[float, float]:
    x, y = 0.7 * torch.randn(64, 16, dtype=F64), 0.7 * torch.randn(64, 16, dtype=F64)
    w = torch.randn(32, 16, dtype=F64)
    own = positive_random(x, w, 0.0, False) @ positive_random(y, w, 0.0, False).T
    waves = [torch.cat((torch.sin(z @ w.T), torch.cos(z @ w.T)), -1) * torch.exp(z.square().sum(-1, keepdim=True) / 2) for z in (x, y)]
    return float((own < 0).double().mean()), float((waves[0] @ waves[1].T < 0).double().mean())


def softmax_and_maps() -> tuple[Callable[[int], tuple[Tensor, Tensor, Tensor]], Tensor]:
    """A generator of (q, k, softmax weights) from fixed projections, std 1.6, N = 32, d = 16; and the causal mask."""
    w = torch.randn(2, 16, 16) * 1.6 / 4
    past = torch.ones(32, 32, dtype=torch.bool).tril()

    def draw(batch: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(batch, 1, 32, 16)
        q, k = x @ w[0], x @ w[1]
        return 1.6 * q, 1.6 * k, (1.6 * q @ (1.6 * k).transpose(-1, -2) / 4).masked_fill(~past, -math.inf).softmax(-1)

    return draw, past


def linear_weights(phi_q: Tensor, phi_k: Tensor, past: Tensor) -> Tensor:
    a = (phi_q @ phi_k.transpose(-1, -2)) * past
    return a / a.sum(-1, keepdim=True).clamp_min(1e-12)


def divergence(teacher: Tensor, student: Tensor) -> float:
    ratio = torch.where(teacher > 0, teacher.clamp_min(1e-30).log() - student.clamp_min(1e-12).log(), 0.0)
    return float((teacher * ratio).sum(-1).mean())


def distilled(steps: int = 300) -> tuple[float, float, float, float]:
    """(KL of the distilled map, KL of ELU + 1, rank correlation of the last row with softmax, the same of ELU + 1), on held-out data."""
    draw, past = softmax_and_maps()
    maps = [torch.eye(16)[None].clone().requires_grad_() for _ in range(2)]
    none = torch.zeros(1)
    optimizer = torch.optim.Adam(maps, 1e-2)
    for _ in range(steps):
        q, k, teacher = draw(16)
        student = linear_weights(mapped(q, maps[0], none, "softmax", 1e-12), mapped(k, maps[1], none, "softmax", 1e-12), past)
        optimizer.zero_grad()
        distillation_loss(student, teacher).backward()
        optimizer.step()
    with torch.no_grad():
        q, k, teacher = draw(64)
        student = linear_weights(mapped(q, maps[0], none, "softmax", 1e-12), mapped(k, maps[1], none, "softmax", 1e-12), past)
        elu = linear_weights(F.elu(q) + 1, F.elu(k) + 1, past)

        def rank(a: Tensor) -> float:
            places = [x[..., -1, :].argsort(-1).argsort(-1).double() for x in (a, teacher)]
            centred = [p - p.mean(-1, keepdim=True) for p in places]
            return float(((centred[0] * centred[1]).sum(-1) / (centred[0].norm(dim=-1) * centred[1].norm(dim=-1))).mean())

        return divergence(teacher, student), divergence(teacher, elu), rank(student), rank(elu)


@check(
    "hedgehog",
    "after 300 steps of attention distillation: held-out KL(softmax || map) / KL(softmax || ELU + 1)",
    below=0.65,
    control="the untrained map",
)
def _() -> tuple[float, float]:
    kl, elu, _, _ = distilled()
    torch.manual_seed(0)
    untrained, base, _, _ = distilled(0)
    return kl / elu, untrained / base


@check("hedgehog", "distilled weights keep softmax's order: rank correlation of the last row", above=0.7, control="ELU + 1")
def _() -> tuple[float, float]:
    _, _, own, elu = distilled()
    return own if own > elu + 0.15 else 0.0, elu


@check("hedgehog", "parallel == chunk == step, and equals a loop over the definition", below=1e-10, control="key map used for queries too")
def _() -> tuple[float, float]:
    q, k, v = qkv(37)
    maps = {name: torch.randn(2, 8, 8, dtype=F64) for name in ("query_map", "key_map")}
    zero = torch.zeros(2, dtype=F64)
    phi_q, phi_k = (mapped(x, maps[f"{side}_map"], zero, "softmax", 1e-12) for x, side in ((q, "query"), (k, "key")))
    truth = naive_kernel(phi_q, phi_k, v, 1e-12)
    mechanism = get("hedgehog")
    assert isinstance(mechanism, Recurrent)
    own = max(naive.gap(out, truth) for out in forms(mechanism, q, k, v, **maps))
    same = forms(mechanism, q, k, v, query_map=maps["key_map"], key_map=maps["key_map"])[0]
    return own, naive.gap(same, truth)


def naive_kernel(phi_q: Tensor, phi_k: Tensor, v: Tensor, eps: float = 0.0) -> Tensor:
    """Causal normalised kernel attention, a loop over tokens; eps: added to the divisor."""
    out = torch.zeros(*phi_q.shape[:-1], v.shape[-1], dtype=v.dtype)
    for t in range(phi_q.shape[-2]):
        a = torch.einsum("bhf,bhjf->bhj", phi_q[:, :, t], phi_k[:, :, : t + 1])
        out[:, :, t] = torch.einsum("bhj,bhje->bhe", a, v[:, :, : t + 1]) / (a.sum(-1, keepdim=True) + eps)
    return out


@check("based", "phi(q).phi(k) = 1 + s + s^2/2, packed and full", below=1e-12, control="without the quadratic term")
def _() -> tuple[float, float]:
    q, k, _ = qkv(30, 16)
    s = q @ k.transpose(-1, -2) / 4
    truth = 1 + s + s * s / 2
    own = max(naive.gap(phi(q) @ phi(k).transpose(-1, -2), truth) for phi in (taylor, taylor_packed))
    return own, naive.gap(1 + s, truth)


@check("based", "recurrent == chunked == parallel, and equals a token loop", below=1e-10, control="softmax in its place")
def _() -> tuple[float, float]:
    q, k, v = qkv(37)
    truth = naive_kernel(taylor(q), taylor(k), v)
    own = 0.0
    for packed in (False, True):
        mechanism = get("based", packed=packed)
        assert isinstance(mechanism, Recurrent)
        own = max([own, *[naive.gap(out, truth) for out in forms(mechanism, q, k, v)]])
    return own, naive.gap(attend(q, k, v, "softmax", mask=Causal()), truth)


def recall(feature: Callable[[Tensor], Tensor], d: int, pairs: int, seeds: int = 10) -> float:
    """Training-free associative recall: share of queried keys whose nearest value is the one stored."""
    right = 0
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        keys = F.normalize(torch.randn(pairs, d, generator=generator, dtype=F64), dim=-1) * 1.5 * math.sqrt(d)
        values = F.normalize(torch.randn(pairs, 32, generator=generator, dtype=F64), dim=-1)
        a = feature(keys) @ feature(keys).T
        read = (a @ values) / a.sum(-1, keepdim=True).clamp_min(1e-12)
        right += int(((read @ values.T).argmax(-1) == torch.arange(pairs)).sum())
    return right / (seeds * pairs)


@check("based", "training-free recall of 64 pairs, d' = 16", above=0.95, control="ReLU linear attention")
def _() -> tuple[float, float]:
    return recall(taylor, 16, 64), recall(torch.relu, 16, 64)


@check("based", "the state-size dial: recall of 256 pairs at d' = 32", above=0.9, control="d' = 16")
def _() -> tuple[float, float]:
    dial = [recall(taylor, d, 256, 4) for d in (8, 16, 24, 32)]
    return dial[3] if dial == sorted(dial) else 0.0, dial[1]
