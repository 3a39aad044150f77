"""Checks of sampleattention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal, Window
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.selected import s_attend
from regard.lab.planted import local_and_columns, relative_error
from regard.lab.verification import check
from regard.zoo.sparse.sampleattention import column_set, cra, tune


@check(
    "sampleattention",
    "alpha = 1 is dense causal attention, and 0.999999 nearly so by window and columns",
    below=1e-4,
    control="alpha = 0.8",
)
def _() -> tuple[float, float]:
    q, k, v = local_and_columns(512)
    truth = attend(q, k, v, mask=Causal())
    outs = [attend(q, k, v, get("sampleattention", alpha=alpha, row_ratio=1.0)) for alpha in (1.0, 1 - 1e-6, 0.8)]
    exact_gap = naive.gap(outs[0], truth)
    return exact_gap * 1e6 + naive.gap(outs[1], truth), naive.gap(outs[2], truth)


@check(
    "sampleattention",
    "planted head: least of mean CRA over all rows minus alpha, alpha 0.8, 0.9, 0.95",
    above=-0.03,
    control="window alone",
)
def _() -> tuple[float, float]:
    q, k, _ = local_and_columns()
    near = torch.arange(1024)[:, None] - torch.arange(1024) < 82
    own = [float(cra(q, k, column_set(q * 40**-0.5, k, alpha, 0.05, 82)[..., None, :] | near).mean()) - alpha for alpha in (0.8, 0.9, 0.95)]
    return min(own), float(cra(q, k, near).mean()) - 0.8


@check(
    "sampleattention",
    "planted head at alpha 0.95: relative error, falling with alpha",
    below=0.12,
    control="a window of 1.7 times the density",
)
def _() -> tuple[float, float]:
    q, k, v = local_and_columns()
    truth = attend(q, k, v, mask=Causal())
    errors = [relative_error(attend(q, k, v, get("sampleattention", alpha=alpha)), truth) for alpha in (0.8, 0.9, 0.95)]
    kept = column_set(q * 40**-0.5, k, 0.95, 0.05, 82)[..., None, :] | (torch.arange(1024)[:, None] - torch.arange(1024) < 82)
    size = int(1.7 * float((kept & torch.ones(1024, 1024, dtype=torch.bool).tril()).double().sum()) / 1024)
    window = relative_error(attend(q, k, v, mask=Causal() & Window(size)), truth)
    return errors[2] if errors == sorted(errors, reverse=True) else math.inf, window


@check(
    "sampleattention",
    "columns equal a loop, and the output attention over window and columns",
    below=1e-10,
    control="columns of the last rows alone",
)
def _() -> tuple[float, float]:
    q, k, v = local_and_columns(300, 8)
    window, rows = round(0.08 * 300), [round(x) for x in torch.linspace(19, 299, 15).tolist()]

    def columns(rows: list[int]) -> list[int]:
        mass, near = [0.0] * 300, 0.0
        for i in rows:
            p = (k[0, 0, : i + 1] @ q[0, 0, i] / math.sqrt(40)).softmax(0).tolist()
            for j, x in enumerate(p):
                if i - j < window:
                    near += x
                else:
                    mass[j] += x
        chosen: list[int] = []
        for j in sorted(range(300), key=lambda j: -mass[j]):
            if near >= 0.95 * len(rows):
                break
            near += mass[j]
            chosen.append(j)
        return chosen

    def output(chosen: list[int]) -> Tensor:
        at = torch.arange(300)
        keep = (at[:, None] - at < window) | torch.isin(at, torch.tensor(chosen, dtype=torch.long))
        return s_attend(q, k, v, (keep & (at <= at[:, None]))[None])

    own = attend(q, k, v, get("sampleattention"))
    wide = [torch.cat((x, 0.5 * x.flip(2), 0.1 * x, x.roll(3, 2)), 1) for x in (q, k, v)]  # heads that call for more, and for fewer columns
    together = attend(wide[0], wide[1][:, ::2], wide[2][:, ::2], get("sampleattention"))
    for h in range(4):
        alone = attend(wide[0][:, h : h + 1], *(x[:, h // 2 * 2 : h // 2 * 2 + 1] for x in wide[1:]), get("sampleattention"))
        own = torch.where(torch.tensor(naive.gap(together[:, h : h + 1], alone) < 1e-10), own, torch.full_like(own, math.inf))
    return naive.gap(own, output(columns(rows))), naive.gap(own, output(columns(list(range(285, 300)))))


@check(
    "sampleattention",
    "residual attention equals a loop over rows, and the tuner takes the smallest alpha whose mean reaches the target: off",
    below=1e-12,
    control="the largest alpha",
)
def _() -> tuple[float, float]:
    q, k, _ = local_and_columns(256, 8)
    keep = torch.rand(1, 1, 256, 256) < 0.3
    rows = [(k[0, 0, : i + 1] @ q[0, 0, i] / math.sqrt(40)).softmax(0)[keep[0, 0, i, : i + 1]].sum() for i in range(256)]
    own = naive.gap(cra(q, k, keep)[0, 0], torch.stack(rows))
    scores, at = {}, torch.arange(256)
    for alpha in (0.5, 0.8, 0.9, 0.98):
        kept = column_set(q * 40**-0.5, k, alpha, 0.05, 20)[..., None, :] | (at[:, None] - at < 20)
        scores[alpha] = float(cra(q, k, kept).mean())
    between = (scores[0.8] + scores[0.9]) / 2  # only the last two reach it
    picked = [tune(q, k, (0.98, 0.8, 0.5, 0.9), target) for target in (between, 2.0)]
    exact = tune(q, k, (0.8, 0.9), scores[0.8])
    return own + abs(picked[0] - 0.9) + abs(picked[1] - 0.98) + abs(exact - 0.8), abs(picked[1] - picked[0])
