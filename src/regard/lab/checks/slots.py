"""Checks of gated slots, native hybrid attention and log-linear attention."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from ...algebra import Causal, Mechanism
from ...catalog import get
from ...engine import attend, step
from ...engine.recurrent import levels
from ...nn import Decoder
from .. import naive
from ..verification import check
from .comparing import F64, gap_with_gradients, streamed
from .weighted import qkv


def slot_loop(q: Tensor, k: Tensor, v: Tensor, f: Tensor, s: Tensor, window: int = 0, scale: float = 1.0, arrival: bool = False) -> Tensor:
    """Slots and window a token at a time: written when a token leaves the window (or, wrongly, on arrival)."""
    b, h, n, d = q.shape
    out = torch.zeros(b, h, n, v.shape[-1], dtype=q.dtype)
    for at in [(x, y) for x in range(b) for y in range(h)]:
        keys, values = torch.zeros(f.shape[-1], d, dtype=q.dtype), torch.zeros(f.shape[-1], v.shape[-1], dtype=q.dtype)
        for t in range(n):
            e = t if arrival else t - window
            if e >= 0:
                keys = f[at][e][:, None] * keys + s[at][e][:, None] * k[at][e]
                values = f[at][e][:, None] * values + s[at][e][:, None] * v[at][e]
            start = max(0, t - window + 1) if window else t + 1
            one = torch.cat((keys, k[at][start : t + 1])) if e >= 0 else k[at][start : t + 1]
            two = torch.cat((values, v[at][start : t + 1])) if e >= 0 else v[at][start : t + 1]
            out[at][t] = torch.softmax(scale * one @ q[at][t], 0) @ two
    return out


def slot_inputs(n: int, strength: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *qkv(n), -strength * torch.rand(1, 2, n, 6, dtype=F64)


@check(
    "gsa",
    "two chained scans with gradients, and streams == the recurrence, with weak and strong gates",
    below=1e-7,
    control="writes of strength 1",
)
def _() -> tuple[float, float]:
    own = []
    for strength in (0.3, 60.0):
        leaves = q, k, v, g = tuple(x.requires_grad_() for x in slot_inputs(90, strength))
        truth = slot_loop(q, k, v, g.exp(), 1 - g.exp())
        out = attend(q, k, v, "gsa", log_forget=g)
        own += [gap_with_gradients(out, truth, leaves), naive.gap(streamed("gsa", q, k, v, log_forget=g), truth)]
    other = attend(q, k, v, "gsa", log_forget=g, write=torch.ones_like(g))
    return max(own), naive.gap(other, truth)


@check(
    "gsa",
    "one-hot writes to as many slots as tokens, unwritten ones left out == causal softmax",
    below=1e-12,
    control="softmax over two tokens a slot",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(12)
    truth = attend(q, k, v, mask=Causal(), scale=1.0)

    def last_row(slots: int) -> float:
        write = F.one_hot(torch.arange(12) % slots, slots).to(F64).expand(1, 2, -1, -1)
        out = attend(q, k, v, "gsa", log_forget=torch.zeros_like(write), write=write)
        return naive.gap(out[:, :, -1], truth[:, :, -1])  # all slots are written by then

    return last_row(12), last_row(6)


@check("gsa", "gates from sums (ABC): K is each slot's softmax average of keys", below=1e-10, control="without the running divisor")
def _() -> tuple[float, float]:
    q, k, v = qkv(50)
    s = 3 * torch.randn(1, 2, 50, 6, dtype=F64)
    mechanism = get("gsa", gates="sum")
    rows: list[Tensor] = []
    other: list[Tensor] = []
    for t in range(50):
        for share, to in ((torch.softmax(s[:, :, : t + 1], 2), rows), (torch.exp(s[:, :, : t + 1]), other)):
            keys, values = share.mT @ k[:, :, : t + 1], share.mT @ v[:, :, : t + 1]
            to.append(torch.softmax(keys @ q[:, :, t, :, None], -2).mT @ values)
    truth = torch.cat(rows, 2)
    own = max(naive.gap(attend(q, k, v, mechanism, write=s), truth), naive.gap(streamed(mechanism, q, k, v, write=s), truth))
    return own, naive.gap(torch.cat(other, 2), truth)


@check(
    "gsa",
    "a decoder of gated slots generates the tokens that full passes would; bytes of its state at 40 and 80 tokens differ by",
    below=0,
    control="softmax's",
)
def _() -> tuple[float, float]:
    def grown(mechanism: str | Mechanism) -> float:
        model = Decoder(mechanism, vocab=20, dim=32, layers=2, heads=2)
        prompt = torch.randint(20, (1, 40))
        out = model.generate(prompt, 3)
        full = model(out[:, :-1])[:, 39:].argmax(-1)
        if not torch.equal(full, out[:, 40:]):
            return math.nan
        sizes = [sum(s.bytes for s in model.step(torch.randint(20, (1, n)))[1]) for n in (40, 80)]
        return float(sizes[1] - sizes[0])

    return grown(get("gsa", slots=8)), grown("softmax")


@check("nha", "w = 8 with gradients, and streams == the loop", below=1e-9, control="tokens written on arrival")
def _() -> tuple[float, float]:
    leaves = q, k, v, g = tuple(x.requires_grad_() for x in slot_inputs(40))
    mechanism = get("nha", window=8, rope=None)
    truth = slot_loop(q, k, v, g.exp(), 1 - g.exp(), 8, 8**-0.5)
    out = attend(q, k, v, mechanism, log_forget=g)
    own = max(gap_with_gradients(out, truth, leaves), naive.gap(streamed(mechanism, q, k, v, log_forget=g), truth))
    return own, naive.gap(out, slot_loop(q, k, v, g.exp(), 1 - g.exp(), 8, 8**-0.5, arrival=True))


@check("nha", "w >= length is causal softmax attention, w = 0 gated slots", below=1e-12, control="w = 8 for both")
def _() -> tuple[float, float]:
    q, k, v, g = slot_inputs(40)
    full = attend(q, k, v, mask=Causal())
    slots = attend(q, k, v, get("gsa", scaled=True), log_forget=g)

    def out(window: int) -> Tensor:
        return attend(q, k, v, get("nha", window=window, rope=None), log_forget=g)

    return max(naive.gap(out(40), full), naive.gap(out(0), slots)), min(naive.gap(out(8), full), naive.gap(out(8), slots))


@check(
    "nha",
    "what a value inside the window gives: softmax's share of the window, times what the slots leave",
    below=1e-9,
    control="softmax's share alone",
)
def _() -> tuple[float, float]:
    q, k, v, g = slot_inputs(40)
    v.requires_grad_()
    out = attend(q, k, v, get("nha", window=8, rope=None), log_forget=g)
    got = torch.autograd.grad(out[0, 0, 30, 0], v)[0][0, 0, 23:31, 0]
    near = 8**-0.5 * k[0, 0, 23:31] @ q[0, 0, 30]
    keys = torch.zeros(6, 8, dtype=F64)
    for e in range(23):
        keys = g[0, 0, e].exp()[:, None] * keys + (1 - g[0, 0, e].exp())[:, None] * k[0, 0, e]
    far = 8**-0.5 * keys @ q[0, 0, 30]
    left = near.logsumexp(0).exp() / (near.logsumexp(0).exp() + far.logsumexp(0).exp())
    return naive.gap(got, left * near.softmax(0)), naive.gap(got, near.softmax(0))


def spans(base: str, n: int = 37) -> tuple[Mechanism, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    q, k, v = qkv(n)
    inputs = {"log_decay": -torch.rand(1, 2, n, dtype=F64), "level_scales": torch.rand(1, 2, n, 7, dtype=F64)}
    if base == "gated-delta":
        k, inputs["beta"] = F.normalize(k, dim=-1), torch.rand(1, 2, n, dtype=F64)
    return get("log-linear-attention", base=base), q, k, v, inputs


def span_sums(q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Tensor], level: str = "fenwick") -> Tensor:
    """Each pair's product of transitions, times its level's scale, in loops over t and j."""
    n = q.shape[2]
    out = torch.zeros_like(v)
    for t in range(n):
        moved = q[:, :, t]  # q_t^T times the transitions after j
        for j in range(t, -1, -1):
            at = (t ^ j).bit_length() if level == "fenwick" else (t - j).bit_length()
            beta = inputs["beta"][:, :, j, None] if "beta" in inputs else 1.0
            w = (moved * k[:, :, j]).sum(-1, keepdim=True) * beta * inputs["level_scales"][:, :, t, at, None]
            out[:, :, t] += w * v[:, :, j]
            if "beta" in inputs:
                moved = moved - beta * (moved * k[:, :, j]).sum(-1, keepdim=True) * k[:, :, j]
            moved = moved * torch.exp(inputs["log_decay"][:, :, j, None])
    return out


@check(
    "log-linear-attention",
    "Mamba-2 and gated delta: the matrix, chunks of 8 and of 64, streams == loops over pairs",
    below=1e-10,
    control="levels by distance",
)
def _() -> tuple[float, float]:
    own, other = [], []
    for base in ("mamba2", "gated-delta"):
        mechanism, q, k, v, inputs = spans(base)
        truth = span_sums(q, k, v, inputs)
        scan, scales = levels.prepared(mechanism, Causal(), q, k, v, None, inputs, 0)  # type: ignore[arg-type]
        found = [levels.parallel(scan, scales), levels.chunked(scan, scales, 8)[0], attend(q, k, v, mechanism, **inputs)]
        found.append(streamed(mechanism, q, k, v, (20, 21, 36), **inputs))
        own += [naive.gap(x, truth) for x in found]
        other.append(naive.gap(found[0], span_sums(q, k, v, inputs, "distance")))
    return max(own), min(other)


@check("log-linear-attention", "gradients of chunks of 8 == those of the matrix", below=1e-9, control="one scale for all levels")
def _() -> tuple[float, float]:
    own = []
    for base in ("mamba2", "gated-delta"):
        mechanism, q, k, v, inputs = spans(base)
        leaves = tuple(x.requires_grad_() for x in (q, k, v, *inputs.values()))
        (scan, scales), again = (levels.prepared(mechanism, Causal(), q, k, v, None, inputs, 0) for _ in range(2))  # type: ignore[arg-type]
        own.append(gap_with_gradients(levels.chunked(scan, scales, 8)[0], levels.parallel(*again), leaves))
    flat = scales.mean(-1, keepdim=True).expand_as(scales)
    return max(own), naive.gap(levels.chunked(scan, flat, 8)[0], levels.parallel(scan, scales))


@check("log-linear-attention", "scales of one == the recurrence itself", below=1e-12, control="random scales")
def _() -> tuple[float, float]:
    own, other = [], []
    for base in ("mamba2", "gated-delta"):
        mechanism, q, k, v, inputs = spans(base)
        plain = attend(q, k, v, mechanism.inner, **{name: x for name, x in inputs.items() if name != "level_scales"})  # type: ignore[attr-defined]
        ones = {**inputs, "level_scales": torch.ones_like(inputs["level_scales"])}
        own.append(naive.gap(attend(q, k, v, mechanism, **ones), plain))
        other.append(naive.gap(attend(q, k, v, mechanism, **inputs), plain))
    return max(own), min(other)


@check(
    "log-linear-attention",
    "states alive after each of 100 tokens, less popcount(t) + 1: the largest miss",
    below=0,
    control="less bit_length(t) + 1",
)
def _() -> tuple[float, float]:
    mechanism, q, k, v, inputs = spans("mamba2", 100)
    inputs["level_scales"] = torch.rand(1, 2, 100, 9, dtype=F64)
    state, own, other = None, 0, 0
    for t in range(100):
        part = {name: x[:, :, t : t + 1] for name, x in inputs.items()}
        _, state = step(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], mechanism, state, **part)
        alive = sum(x is not None for x in state.levels)  # type: ignore[union-attr]
        own, other = max(own, abs(alive - t.bit_count() - 1)), max(other, abs(alive - t.bit_length() - 1))
    return own, other


@check("log-linear-attention", "growth of time from 2048 to 8192 tokens, a doubling", below=2.8, control="the matrix")
def _() -> tuple[float, float]:
    def cost(run: str) -> float:
        found = []
        for n in (2048, 8192):
            q, k, v = (torch.randn(1, 1, n, 32) for _ in range(3))
            inputs = {"log_decay": -0.1 * torch.rand(1, 1, n), "level_scales": torch.rand(1, 1, n, 14)}
            scan, scales = levels.prepared(get("log-linear-attention"), Causal(), q, k, v, None, inputs, 0)  # type: ignore[arg-type]
            runs = []
            for _ in range(3):
                start = time.perf_counter()
                (levels.chunked if run == "chunked" else levels.parallel)(scan, scales)
                runs.append(time.perf_counter() - start)
            found.append(min(runs))
        return (found[1] / found[0]) ** 0.5

    return cost("chunked"), cost("matrix")
