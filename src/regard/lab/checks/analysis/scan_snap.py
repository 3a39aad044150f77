"""Checks of scan-snap."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.nn.decoder import Decoder
from regard.taps import read
from regard.zoo.analysis.scan_snap import ScanRun, attended, attention_on_tokens, scan_and_snap, scan_data

DATA = scan_data(lasts=1, nexts=2, common=10, more_common=0, distinct=10)


@functools.cache
def run(lr_z: float = 0.1, shuffled: bool = False, steps: int = 3000) -> ScanRun:
    return scan_and_snap(DATA, steps=steps, batch=64, lr_z=lr_z, every=250, shuffled=shuffled)


@check(
    "scan-snap",
    "z: common below 0 and falling, distinct ones in the order of P: least of the steps between 0, lowest, middle and highest",
    above=0.05,
    control="next tokens drawn anew",
)
def _() -> tuple[float, float]:
    def least(found: ScanRun) -> float:
        z = torch.stack(found.z)[:, 0]
        distinct = z[-1, 10:].view(2, 10)
        common = z[:, :10].mean(1)
        falling = bool((common.diff() < 1e-3).all()) and bool((z[-1, :10] < 0).all())
        low, middle, high = (float(distinct[:, at].mean()) for at in (0, 5, 9))
        return min(high - middle, middle - low) if falling and low > -0.03 and high > 0 else 0.0

    return least(run()), least(run(shuffled=True, steps=1000))


@check(
    "scan-snap",
    "expected attention on common tokens at step 500 over that at the start",
    below=0.92,
    control="Z all but held (eta_Z = 1e-4)",
)
def _() -> tuple[float, float]:
    own, held = run().common_mass(), run(lr_z=1e-4, steps=500).common_mass()
    return float(own[2] / own[0]), float(held[2] / held[0])


@check(
    "scan-snap",
    "snap: growth of the strongest z over the last 1500 of 3000 steps, over that of the first 500",
    below=0.25,
    control="while it scans: steps 250 to 750",
)
def _() -> tuple[float, float]:
    top = (run().top() + run().top(following=1)) / 2
    begin, snap = run().phases()
    ordered = 0 < begin < snap < 3000 and float(run(lr_z=0.3, steps=1000).top()[-1]) > float(run().top()[4])
    shares = run().expected()[-1, 0, 0, 10:20]
    winner = float(shares.max() / shares.sum())
    early = float(top[2] - top[0])
    return float(top[-1] - top[6]) / early if ordered and winner < 0.4 else 1.0, float(top[3] - top[1]) / early


@check("scan-snap", "three steps of SGD by hand, attention by loops over tokens", below=1e-5, control="f without its norm")
def _() -> tuple[float, float]:
    results = []
    for normalised in (True, False):
        generator = torch.Generator().manual_seed(5)
        z, y = torch.zeros(1, 30, requires_grad=True), torch.zeros(2, 30, requires_grad=True)
        for _ in range(3):
            counts, _, n = DATA.draw(16, 20, generator)
            total = torch.zeros(())
            for row, label in zip(counts, n, strict=True):
                b = torch.stack([c * z[0, t].exp() for t, c in enumerate(row)])
                b = b / b.sum()
                f = b / b.square().sum().sqrt() if normalised else b
                logits = torch.stack([(y[k] * f).sum() for k in range(2)])
                total = total - (logits[label] - logits.exp().sum().log()) / 16
            by_z, by_y = torch.autograd.grad(total, (z, y))
            z, y = (z - 0.7 * by_z).detach().requires_grad_(), (y - 2.0 * by_y).detach().requires_grad_()
        results.append(z.detach())
    found = scan_and_snap(DATA, length=20, steps=3, batch=16, lr_y=2.0, lr_z=0.7, every=3, seed=5).z[-1]
    huge = attended(torch.tensor([[900.0, 0.0]], dtype=F64), torch.ones(1, 2, dtype=F64))
    return naive.gap(found, results[0]) + naive.gap(huge, torch.tensor([[1.0, 0.0]], dtype=F64)), naive.gap(found, results[1]) * 100


@check("scan-snap", "data: probabilities and kinds of tokens by hand; weights of a decoder by token: loops", below=1e-6, control="by place")
@torch.no_grad()
def _() -> tuple[float, float]:
    data = scan_data(lasts=2, nexts=3, common=2, more_common=1, distinct=4, common_weight=0.5, low=0.25)
    p = torch.zeros(2, 3, 2 + 2 + 24)
    for m in range(2):
        for n in range(3):
            p[m, n, [0, 1, 2 + m]] = 0.5
            for k in range(4):
                p[m, n, 4 + (m * 3 + n) * 4 + k] = 0.25 + 0.25 * k
    gap = naive.gap(data.probabilities, p / p.sum(-1, keepdim=True)) + float(
        (data.common[1] != torch.tensor([1, 1, 0, 1] + [0] * 24).bool()).sum()
    )
    counts, last, following = data.draw(50, 9, torch.Generator().manual_seed(0))
    gap += float((counts.sum(1) != 8).sum()) + float((following // 3 != last).sum()) + float((counts * (p[last, following % 3] == 0)).sum())
    model, ids = Decoder(vocab=6, dim=16, layers=1, heads=2).eval(), torch.randint(6, (5, 7))
    ids[:, -1] = torch.tensor([1, 1, 2, 2, 2])
    found = attention_on_tokens(model, ids, 6)
    with read(model, "weights") as seen:
        model(ids)
    w, truth = seen["weights", 0][:, :, -1], torch.zeros(2, 6, 6)
    for b in range(5):
        for place in range(7):
            truth[:, ids[b, -1], ids[b, place]] += w[b, :, place] / (2 if b < 2 else 3)
    known = [1, 2]
    blank = bool(found[0, :, [0, 3, 4, 5]].isnan().all())
    by_place = F.pad(w[:2].mean(0), (0, 0))[:, :6]
    return gap + naive.gap(found[0][:, known], truth[:, known]) + (not blank), naive.gap(by_place, truth[:, 1])
