"""Checks of cab."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regard.algebra import Where
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.nn.pattern_net import PATTERNS, Vanilla, declared, fault, layer_of, supported
from regard.tasks.long_sequences import tasks
from regard.tasks.pattern_scores import benefit, compositional_index, efficiency_length, pattern_correlation
from regard.tasks.sequence_measures import chamfer, f_score, mel_cepstral_distortion, psnr, rouge, spectral_distortion, ssim
from regard.zoo.analysis.cab import trained


class Changed(nn.Module):
    """A layer whose pass or step is changed."""

    def __init__(self, layer: Any, forward: Callable[..., Tensor] | None = None, off: float = 0.0):
        super().__init__()
        self.layer, self.changed, self.off = layer, forward, off

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return self.changed(self.layer, x, *context) if self.changed else self.layer(x, *context)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.layer.step(x, state)
        return y + self.off, state


def lookahead(layer: Attention, x: Tensor) -> Tensor:
    return layer(x, mask=Where(lambda b, h, i, j: j <= i + 1))  # type: ignore[no-any-return]


@check(
    "cab",
    "verdicts of the pattern tester: dense layers pass; bidirectional, lookahead of 1, steps off by 0.01, pooled queries, half a source, NaN fail",
    below=0,
    control="a tester of shapes alone",
)
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    dense, causal = Attention(16, 2, causal=False).double(), Attention(16, 2).double()
    good = [(layer_of("softmax", p, 16, 2).double(), p) for p in PATTERNS] + [(Changed(causal), "causal self"), (dense, "causal cross")]
    bad: list[tuple[nn.Module, str]] = [
        (Changed(causal, lambda layer, x: dense(x)), "causal self"),
        (Changed(dense, lookahead), "causal self"),
        (Changed(causal, off=1e-2), "causal self"),
        (Vanilla(16, 2, True).double(), "noncausal self"),
        (dense, "causal self"),
        (Attention(16, 2, "agent-attention", causal=False).double(), "causal cross"),
        (Changed(dense, lambda layer, x, source: layer(x, source[:, :8])), "causal cross"),
        (Changed(dense, lambda layer, x, source: layer(x, source[:, 8:])), "noncausal cross"),
        (Changed(dense, lambda layer, x, source: layer(x, source) / 0 * 0), "noncausal cross"),
    ]
    wrong = sum(bool(fault(layer, p, 16)) for layer, p in good) + sum(not fault(layer, p, 16) for layer, p in bad)
    wrong += bool(fault(dense, "noncausal cross", 16, permutes=True)) + bool(fault(dense, "noncausal self", 16, permutes=True))
    wrong += not fault(Attention(16, 2, causal=False, rope=True).double(), "noncausal self", 16, permutes=True)
    x = torch.randn(2, 22, 16, dtype=F64)
    fooled = sum(layer(x, *([x[:, :17]] if "cross" in p else [])).shape == x.shape for layer, p in bad if layer is not dense)
    return float(wrong), float(fooled)


@check(
    "cab",
    "patterns of twelve systems, declared and verified, against what their papers' masks allow: how many of 48 differ",
    below=0,
    control="the declaration without the call",
)
def _() -> tuple[float, float]:
    every, own, whole, past = "1111", "0100", "1010", "0000"
    truth = {
        **{"softmax": every, "hedgehog": every, "sparsemax": every, "sigmoid": every},
        **{"gla": own, "deltanet": own, "moba": own, "mega": own, "agent-attention": whole, "flexprefill": past},
        **{"tapa": "1110", "nabla": "1000"},  # distances to the end of the keys; tokens of one grid
    }
    found, said = (
        {name: "".join("01"[not own[p]] for p in PATTERNS) for name in truth for own in [f(name)]} for f in (supported, declared)
    )
    return tuple(float(sum(a != b for name in truth for a, b in zip(one[name], truth[name], strict=True))) for one in (found, said))


@check(
    "cab",
    "efficiency lengths of planted costs, odd lengths, a first cost that the line leaves out, a flat and a missing crossing: the root, |n* - root|",
    below=1e-6,
    control="the other root",
)
def _() -> tuple[float, float]:
    lengths, gap, other = [256, 512, 1024, 2048, 4096, 8192, 999], 0.0, math.inf
    for a, b, c, d, e in (
        (2e-6, 1e-3, 0.5, 9e-3, 2.0),
        (1e-3, 0.0, 4.0, 3.0, 1.0),
        (3e-9, 1e-6, 1e-4, 7e-6, 3e-4),
        (1.0, 5.0, 0.0, 905.0, 7.0),
    ):
        f, g = [a * n * n + b * n + c for n in lengths], [d * n + e for n in lengths]
        root = math.sqrt((b - d) ** 2 - 4 * a * (c - e))
        high, low = ((d - b + sign * root) / (2 * a) for sign in (1, -1))
        for costs, skip in ((g, 0), ([1e3 + g[0], *g[1:]], 1)):
            found = efficiency_length(lengths, f, costs, skip)
            assert found is not None
            gap, other = max(gap, abs(found - high)), min(other, abs(found - low))
    line, none = efficiency_length(lengths, [3.0 * n for n in lengths], [n + 100.0 for n in lengths]), []
    assert line is not None
    none.append(efficiency_length(lengths, [1e-6 * n * n + 5 for n in lengths], [1e-6 * n for n in lengths]))  # below everywhere: no root
    none.append(efficiency_length(lengths, [n + 5.0 for n in lengths], [2.0 * n for n in lengths]))
    none.append(efficiency_length(lengths, [9e3 * n - 1e-1 * n * n for n in lengths], [2.0 * n for n in lengths]))
    return max(gap, abs(line - 50), float(any(x is not None for x in none))), other


@check(
    "cab",
    "index by hand with a method in one task alone; the mean scores 0, mean + sigma where lower is better -1; the same after positive affine maps",
    below=1e-9,
    control="every measure as if higher were better",
)
def _() -> tuple[float, float]:
    higher = {("a", "up"): True, ("a", "down"): False, ("b", "error"): False}
    up, down, error = [3.0, 5.0, 4.5], [10.0, 7.0, 7.5], [0.5, 0.1]
    scores: dict[str, Any] = {m: {"a": {"up": up[n], "down": down[n]}} for n, m in enumerate("xyz")}
    for n, m in enumerate("xy"):
        scores[m]["b"] = {"error": error[n]}

    def z(values: list[float], n: int) -> float:
        mu = sum(values) / len(values)
        return (values[n] - mu) / math.sqrt(sum((v - mu) ** 2 for v in values) / len(values))

    a = [(z(up, n) - z(down, n)) / 2 for n in range(3)]
    hand = {"x": (a[0] - z(error, 0)) / 2, "y": (a[1] - z(error, 1)) / 2, "z": a[2]}
    scaled = {m: {t: {k: 7 * v - 3 for k, v in own.items()} for t, own in tasks.items()} for m, tasks in scores.items()}
    norms = {("a", "up"): (4.0, 2.0), ("a", "down"): (6.0, 0.5), ("b", "error"): (0.3, 0.2)}
    known = {"mean": {"a": {"up": 4.0, "down": 6.0}}, "worse": {"b": {"error": 0.5}}, "same": {"a": {"up": 4.0, "down": 6.0}}}
    told = compositional_index(known, higher, norms)
    gap = max(abs(f[m] - hand[m]) for f in (compositional_index(scores, higher), compositional_index(scaled, higher)) for m in hand)
    gap = max(gap, abs(told["mean"]), abs(told["worse"] + 1), abs(compositional_index({"x": scores["x"]}, higher)["x"]))
    found = pattern_correlation({"p": hand, "q": {"y": 1.0, "x": 3.0, "z": 2.5, "w": 9.0}, "r": {"x": 1.0, "y": 2.0}})
    p, q = torch.tensor([*hand.values()], dtype=F64), torch.tensor([3.0, 1.0, 2.5], dtype=F64)
    pearson = float(((p - p.mean()) * (q - q.mean())).sum() / ((p - p.mean()).norm() * (q - q.mean()).norm()))
    gap = max(gap, abs((found["p / q"] or 9) - pearson), float(found["p / r"] is not None or found["q / r"] is not None))
    gain = benefit(scores["x"], scores["y"], higher)
    gap = max(gap, abs(gain["a"]["up"] + 2), abs(gain["a"]["down"] + 3), abs(gain["b"]["error"] + 0.4))
    upwards = compositional_index(scores, dict.fromkeys(higher, True))
    return gap, max(abs(upwards[m] - hand[m]) for m in hand)


def cepstral(x: Tensor, y: Tensor, first: int) -> float:
    """Mel cepstral distortion by sums over channels; coefficients `first` to 13."""
    total, n = 0.0, x.shape[-1]
    for a, b in zip(x.flatten(0, 1).tolist(), y.flatten(0, 1).tolist(), strict=True):
        square = 0.0
        for d in range(first, 14):
            c = sum((u - v) * math.cos(math.pi * d * (2 * at + 1) / (2 * n)) for at, (u, v) in enumerate(zip(a, b, strict=True)))
            square += (c * math.sqrt((1 if d == 0 else 2) / n)) ** 2
        total += 10 / math.log(10) * math.sqrt(2 * square)
    return total / x.shape[:2].numel()


@check(
    "cab",
    "MCD, MSD, ROUGE, both Chamfer distances, F-score, PSNR and SSIM of uneven sizes equal loops",
    below=1e-9,
    control="MCD with the first coefficient",
)
def _() -> tuple[float, float]:
    x, y = torch.randn(2, 5, 20, dtype=F64), torch.randn(2, 5, 20, dtype=F64)
    mcd = mel_cepstral_distortion(x, y)
    gap = abs(mcd - cepstral(x, y, 1))
    rows = [math.sqrt(sum((float(x[b, t, c]) - float(y[b, t, c])) ** 2 for c in range(20)) / 20) for b in range(2) for t in range(5)]
    gap = max(gap, abs(spectral_distortion(x, y) - sum(rows) / 10))
    said, true = torch.tensor([[1, 2, 3, 2, 5], [4, 4, 4, 4, 4]]), torch.tensor([[2, 3, 1, 2], [4, 6, 4, 7]])
    hand = {"1": (8 / 9 + 4 / 9) / 2, "2": (2 * 2 / 7) / 2, "L": (2 * 3 / 9 + 2 * 2 / 9) / 2}  # pairs 12 and 23; 2 3 2 and 4 4
    gap = max(gap, *(abs(rouge(said, true, kind) - 100 * value) for kind, value in hand.items()))
    p, q = torch.rand(2, 6, 3, dtype=F64), torch.rand(2, 9, 3, dtype=F64)
    sums, f = [0.0, 0.0], 0.0
    for b in range(2):
        far = [[math.dist(u, v) for v in q[b].tolist()] for u in p[b].tolist()]
        there, back = [min(row) for row in far], [min(col) for col in zip(*far, strict=True)]
        for at, power in enumerate((1, 2)):
            sums[at] += (sum(d**power for d in there) / 6 + sum(d**power for d in back) / 9) / 2
        shares = [sum(d < 0.3 for d in one) / len(one) for one in (there, back)]
        f += 2 * shares[0] * shares[1] / (sum(shares) or 1) / 2
    gap = max(gap, abs(float(chamfer(p, q, 1)) - sums[0] / 2), abs(float(chamfer(p, q, 2)) - sums[1]), abs(f_score(p, q, 0.3) - f))
    real = torch.rand(2, 9, 8, dtype=F64)
    near = (real + 0.2 * torch.randn(2, 9, 8, dtype=F64)).clamp(0, 1)
    gap = max(gap, abs(psnr(real, near) - sum(10 * math.log10(1 / float((real[n] - near[n]).square().mean())) for n in range(2)) / 2))
    local = []
    for picture, top, side in ((n, r, c) for n in range(2) for r in range(3) for c in range(2)):
        u, v = (z[picture, top : top + 7, side : side + 7].flatten() for z in (real, near))
        both = ((u - u.mean()) * (v - v.mean())).sum() / 48
        above = (2 * u.mean() * v.mean() + 1e-4) * (2 * both + 9e-4)
        local.append(float(above / ((u.mean() ** 2 + v.mean() ** 2 + 1e-4) * (u.var() + v.var() + 9e-4))))
    return max(gap, abs(ssim(real, near) - sum(local) / 12)), abs(mcd - cepstral(x, y, 0))


@check(
    "cab",
    "vanilla attention, whose costs others are compared with == loops over queries and keys, causal and not",
    below=1e-12,
    control="the causal one without its mask",
)
def _() -> tuple[float, float]:
    x, gaps, unmasked = torch.randn(2, 7, 12, dtype=F64), [], 0.0
    for causal in (True, False):
        layer = Vanilla(12, 3, causal).double()
        q, k, v = (y(x).unflatten(-1, (3, 4)).transpose(1, 2) for y in (layer.q, layer.k, layer.v))
        out = naive.attention(q, k, v, lambda s: s.softmax(-1), (lambda i, j: j <= i) if causal else None)
        truth = layer.out(out.transpose(1, 2).flatten(2))
        gaps.append(naive.gap(layer(x), truth))
        if causal:
            free = naive.attention(q, k, v, lambda s: s.softmax(-1))
            unmasked = naive.gap(layer(x), layer.out(free.transpose(1, 2).flatten(2)))
    return max(gaps), unmasked


def left(name: str, pattern: str, spec: str, steps: int, batch: int, seed: int = 0) -> float:
    """The loss of a net, trained or not, on held-out samples."""
    cell = tasks(64)[name, pattern]
    net = trained(spec, cell, pattern, seed, steps, batch, 1e-2, 64, dim=32, heads=2, depth=1)
    data = cell.draw(64, torch.Generator().manual_seed(2**31))
    with torch.no_grad():
        return float(cell.loss(net(data.source, data.target), data))


@check(
    "cab",
    "seven tasks, 50 steps with softmax and with hedgehog: the loss over the untrained net's, the largest",
    below=0.96,
    control="another untrained net",
)
def _() -> tuple[float, float]:
    ratios, idle = [], []
    for name, pattern in dict(reversed(list(tasks(64)))).items():  # of a task with several patterns, the first
        start = left(name, pattern, "softmax", 0, 8)
        ratios += [left(name, pattern, spec, 50, 16 if name == "summary" else 8) / start for spec in ("softmax", "hedgehog")]
        idle.append(left(name, pattern, "softmax", 0, 8, 1) / start)
    return max(ratios) if len(idle) == 7 else math.inf, max(idle)


@check(
    "cab",
    "benefit of attention: loss of forecasts after 60 steps with softmax over that with attention removed",
    below=0.6,
    control="removed, another seed",
)
def _() -> tuple[float, float]:
    own, without, other = (left("forecast", "noncausal cross", *run) for run in (("softmax", 60, 8), ("none", 60, 8), ("none", 60, 8, 1)))
    return own / without, other / without
