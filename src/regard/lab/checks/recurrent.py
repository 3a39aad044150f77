"""Checks of the rows with decay or erasure: Lightning Attention-2, GLA, DeltaNet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...algebra import Causal, Recurrent
from ...catalog import get
from ...engine import attend, step
from ...engine import recurrent as scans
from ...mechanisms.recurrent.lightning import lightning_in_parts
from .. import naive
from ..verification import check

F64 = torch.float64


def qkv(n: int = 40, d: int = 8, e: int = 5, m: int | None = None, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, heads, n, d, dtype=F64), torch.randn(1, heads, m or n, d, dtype=F64), torch.randn(1, heads, m or n, e, dtype=F64)


def scan_of(mechanism: Recurrent, q: Tensor, k: Tensor, v: Tensor, **inputs: Tensor) -> scans.Scan:
    return scans.pose(mechanism, Causal(), q, k, v, None, inputs)


def forms(mechanism: Recurrent, q: Tensor, k: Tensor, v: Tensor, chunk: int = 16, **inputs: Tensor) -> list[Tensor]:
    """(parallel, chunk, step) outputs."""
    scan = scan_of(mechanism, q, k, v, **inputs)
    return [scans.run(scan, mode, None, chunk)[0] for mode in ("parallel", "chunk", "step")]


@check(
    "lightning-attention-2",
    "chunks == masked product for N in {1, 63, 64, 65, 200}, s in {0, 0.05, 1}",
    below=1e-10,
    control="decay left out",
)
def _() -> tuple[float, float]:
    own = other = 0.0
    for n in (1, 63, 64, 65, 200):
        for s in (0.0, 0.05, 1.0):
            q, k, v = qkv(n)
            i = torch.arange(n, dtype=F64)
            past = torch.exp(-s * (i[:, None] - i).clamp_min(0)).tril()
            truth = ((q @ k.transpose(-1, -2)) * past) @ v
            out = attend(q, k, v, "lightning-attention-2", log_decay=torch.full((2,), -s, dtype=F64))
            own = max(own, naive.gap(out, truth))
            other = max(other, naive.gap(((q @ k.transpose(-1, -2)).tril()) @ v, truth) if s else 0.0)
    return own, other


@check("lightning-attention-2", "parts side by side, states joined by a scan, equal one pass", below=1e-10, control="parts left apart")
def _() -> tuple[float, float]:
    q, k, v = qkv(101)
    rate = -torch.tensor([0.05, 0.3], dtype=F64)
    truth = attend(q, k, v, "lightning-attention-2", log_decay=rate)
    own = max(naive.gap(lightning_in_parts(q, k, v, rate, parts), truth) for parts in (1, 2, 5, 8, 101))
    cuts = [[x[:, :, at : at + 20] for x in (q, k, v)] for at in range(0, 101, 20)]
    apart = [attend(a, b, c, "lightning-attention-2", log_decay=rate) for a, b, c in cuts]
    return own, naive.gap(torch.cat(apart, 2), truth)


@check("lightning-attention-2", "random segments with carried state equal one pass", below=1e-10, control="state dropped between segments")
def _() -> tuple[float, float]:
    q, k, v = qkv(200)
    slopes = {"log_decay": torch.tensor([-0.05, -0.2], dtype=F64)}
    whole = attend(q, k, v, "lightning-attention-2", **slopes)
    kept, dropped, state = [], [], None
    for start, stop in ((0, 13), (13, 14), (14, 90), (90, 200)):
        piece = [x[:, :, start:stop] for x in (q, k, v)]
        out, state = step(*piece, "lightning-attention-2", state, **slopes)
        kept.append(out)
        dropped.append(attend(*piece, "lightning-attention-2", **slopes))
    return naive.gap(torch.cat(kept, 2), whole), naive.gap(torch.cat(dropped, 2), whole)


def gradient_gap(mechanism: Recurrent, q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Tensor], truth: Callable[..., Tensor]) -> float:
    """Largest difference between gradients of the chunked form and of a token loop."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, *inputs.values())]
    named = dict(zip(inputs, leaves[3:], strict=True))
    seed = torch.randn(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    out = scans.run(scan_of(mechanism, *leaves[:3], **named), "chunk", None, 16)[0]
    own = torch.autograd.grad((out * seed).sum(), leaves)
    loop = torch.autograd.grad((truth(*leaves) * seed).sum(), leaves)
    return max(naive.gap(a, b) for a, b in zip(own, loop, strict=True))


@check("lightning-attention-2", "gradients equal those of the token loop", below=1e-9, control="decay off by one token")
def _() -> tuple[float, float]:
    q, k, v = qkv(65)
    inputs = {"log_decay": torch.tensor([-0.05, -0.7], dtype=F64)}
    mechanism = get("lightning-attention-2")
    assert isinstance(mechanism, Recurrent)

    def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return naive.recurrence(q, k, v, g[None, :, None, None].expand(1, 2, 65, 1))[0]

    def late(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return naive.recurrence(q, k * torch.exp(g)[None, :, None, None], v, g[None, :, None, None].expand(1, 2, 65, 1))[0]

    return gradient_gap(mechanism, q, k, v, inputs, loop), gradient_gap(mechanism, q, k, v, inputs, late)


def gla_inputs(n: int, strength: float = 1.0) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    q, k, v = qkv(n)
    return q, k, v, {"log_decay": -strength * torch.rand(1, 2, n, 8, dtype=F64)}


@check(
    "gla",
    "parallel, chunked and secondary-chunked forms equal the recurrence, weak and strong gates",
    below=1e-10,
    control="one gate a token",
)
def _() -> tuple[float, float]:
    mechanism = get("gla")
    assert isinstance(mechanism, Recurrent)
    own = other = 0.0
    for strength in (0.1, 8.0):
        q, k, v, inputs = gla_inputs(64, strength)
        truth = naive.recurrence(q / math.sqrt(8), k, v, inputs["log_decay"])[0]
        own = max([own, *[naive.gap(out, truth) for chunk in (16, 64) for out in forms(mechanism, q, k, v, chunk, **inputs)]])
        mean = inputs["log_decay"].mean(-1, keepdim=True).expand_as(inputs["log_decay"])
        other = max(other, naive.gap(forms(mechanism, q, k, v, log_decay=mean)[1], truth))
    return own, other


@check("gla", "gradients, the gate's included, equal those of the token loop", below=1e-8, control="scale left out")
def _() -> tuple[float, float]:
    q, k, v, inputs = gla_inputs(64)
    mechanism = get("gla")
    assert isinstance(mechanism, Recurrent)
    return (
        gradient_gap(mechanism, q, k, v, inputs, lambda q, k, v, g: naive.recurrence(q / math.sqrt(8), k, v, g)[0]),
        gradient_gap(mechanism, q, k, v, inputs, lambda q, k, v, g: naive.recurrence(q, k, v, g)[0]),
    )


@check("gla", "strong gates (about -4 a token) in float32 match float64: relative error", below=1e-4, control="naive Q e^B, K e^-B")
def _() -> tuple[float, float]:
    q, k, v = (x.float() for x in qkv(64))
    g = -4 - 0.5 * torch.rand(1, 2, 64, 8)
    truth = naive.recurrence(q.double() / math.sqrt(8), k.double(), v.double(), g.double())[0]
    own = naive.gap(attend(q, k, v, "gla", log_decay=g).double(), truth) / float(truth.abs().max())
    total = g.cumsum(-2)
    split = ((q * torch.exp(total) / math.sqrt(8)) @ (k * torch.exp(-total)).transpose(-1, -2)).tril() @ v
    return own, naive.gap(split.double(), truth) / float(truth.abs().max())


@check(
    "gla", "equal gates in all channels are Lightning's scalar decay, alpha = 1 plain linear attention", below=1e-10, control="other gates"
)
def _() -> tuple[float, float]:
    q, k, v, inputs = gla_inputs(50)
    g = torch.tensor([-0.1, -0.3], dtype=F64)
    same = attend(q, k, v, "gla", scale=1.0, log_decay=g[None, :, None, None].expand(1, 2, 50, 8))
    light = attend(q, k, v, "lightning-attention-2", log_decay=g)
    plain = attend(q, k, v, "gla", scale=1.0, log_decay=torch.zeros(1, 2, 50, 8, dtype=F64))
    own = max(naive.gap(same, light), naive.gap(plain, (q @ k.transpose(-1, -2)).tril() @ v))
    return own, naive.gap(attend(q, k, v, "gla", scale=1.0, **inputs), light)


def delta_inputs(n: int = 64) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    q, k, v = qkv(n)
    return q, F.normalize(k, dim=-1), v, {"beta": torch.rand(1, 2, n, dtype=F64)}


@check("deltanet", "parallel and chunked (WY) forms equal the recurrence", below=1e-10, control="additive writes")
def _() -> tuple[float, float]:
    mechanism = get("deltanet")
    assert isinstance(mechanism, Recurrent)
    q, k, v, inputs = delta_inputs()
    truth = naive.recurrence(q / math.sqrt(8), k, v, beta=inputs["beta"])[0]
    own = max(naive.gap(out, truth) for out in forms(mechanism, q, k, v, **inputs))
    return own, naive.gap(naive.recurrence(q / math.sqrt(8), k, inputs["beta"][..., None] * v)[0], truth)


@check("deltanet", "gradients, beta's included, equal those of the token loop", below=1e-8, control="additive writes")
def _() -> tuple[float, float]:
    q, k, v, inputs = delta_inputs()
    mechanism = get("deltanet")
    assert isinstance(mechanism, Recurrent)
    return (
        gradient_gap(mechanism, q, k, v, inputs, lambda q, k, v, b: naive.recurrence(q / math.sqrt(8), k, v, beta=b)[0]),
        gradient_gap(mechanism, q, k, v, inputs, lambda q, k, v, b: naive.recurrence(q / math.sqrt(8), k, b[..., None] * v)[0]),
    )


@check(
    "deltanet",
    "8 orthonormal keys written 64 times with beta = 1: each read gives the LAST value written",
    below=1e-12,
    control="additive writes",
)
def _() -> tuple[float, float]:
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=F64))[0]
    order = torch.cat([torch.randperm(8) for _ in range(8)])
    k, v = basis[order][None, None], torch.randn(1, 1, 64, 5, dtype=F64)
    last = torch.stack([v[0, 0, int((order == key).nonzero().max())] for key in range(8)])
    reads = basis[None, None]
    queries = torch.cat((torch.zeros(1, 1, 64, 8, dtype=F64), reads), 2)
    keys, values = torch.cat((k, torch.zeros(1, 1, 8, 8, dtype=F64)), 2), torch.cat((v, torch.zeros(1, 1, 8, 5, dtype=F64)), 2)

    def read(mechanism: Recurrent, **inputs: Tensor) -> float:
        return naive.gap(attend(queries, keys, values, mechanism, scale=1.0, **inputs)[0, 0, 64:], last)

    delta = get("deltanet")
    assert isinstance(delta, Recurrent)
    return read(delta, beta=torch.ones(1, 1, 72, dtype=F64)), read(
        replace(delta, write="add", decay="head", inputs=()), log_decay=torch.zeros(1, dtype=F64)
    )


@check("deltanet", "beta = 0 leaves a carried state unchanged", below=0.0, control="beta = 0.5")
def _() -> tuple[float, float]:
    q, k, v, inputs = delta_inputs()
    _, before = step(q, k, v, "deltanet", **inputs)

    def moved(beta: float) -> float:
        _, after = step(q, k, v, "deltanet", before, beta=torch.full((1, 2, 64), beta, dtype=F64))
        return naive.gap(after.s, before.s)  # type: ignore[union-attr]

    return moved(0.0), moved(0.5)
