"""Checks of active-dormant-heads."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from regard.interpret.sinks import SinkReport, forced, sink_report
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.taps import read
from regard.tasks.backcopy import backcopy, stationary, text_bigrams
from regard.zoo.analysis.active_dormant_heads import BackcopyModel, mutual_reinforcement, train_backcopy


def probe() -> tuple[Tensor, Tensor]:
    task = backcopy()
    ids = task.draw(64, 32, torch.Generator().manual_seed(99))[:, :-1]
    return ids, torch.isin(ids, task.triggers)


@functools.cache
def trained(attention: str) -> SinkReport:
    model = train_backcopy(backcopy(), attention, steps=350, length=32, dim=64, batch=32, lr=2e-3)
    return sink_report(model, *probe(), logits=attention == "softmax")


def one(report: SinkReport, name: str) -> float:
    return float(getattr(report, name).scores[0, 0])


@check(
    "active-dormant-heads",
    "softmax trained on Bigram-Backcopy: weight on the first token on dormant rows, if copying rows give it under 0.05 and copy over 0.5",
    above=0.2,
    control="ReLU attention",
)
def _() -> tuple[float, float]:
    soft, relu = trained("softmax"), trained("relu")
    good = one(soft, "active") <= 0.05 and one(soft, "previous") >= 0.5 and soft.gap is not None and one(soft, "gap") > 0.3
    return one(soft, "dormant") if good else 0.0, one(relu, "dormant")


@check("active-dormant-heads", "value drain: length of the first token's value over the others'", below=0.7, control="before training")
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    return one(trained("softmax"), "value"), one(sink_report(BackcopyModel(25, 64, length=32), *probe()), "value")


@check("active-dormant-heads", "ReLU attention: all weight of dormant rows", below=0.15, control="before training")
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    model = BackcopyModel(25, 64, attention="relu", length=32)
    with torch.no_grad():
        model.blocks[0].attention.q.weight.mul_(3)  # type: ignore[union-attr, operator]
    return one(trained("relu"), "total"), one(sink_report(model, *probe(), logits=False), "total")


@check(
    "active-dormant-heads",
    "reduced flow: time at which the logit is a, against its closed form (b = 0), and growth by log t away from 1/2 (both learned)",
    below=0.05,
    control="the first token's value held at the others' spread",
)
def _() -> tuple[float, float]:
    zero = mutual_reinforcement(value=0.0, learn_value=False, end=1e6)
    n, gaps = 8, []
    for t, a in zip(zero.times[10:], zero.sink[10:], strict=True):
        closed = ((math.exp(2 * a) - 1) / 2 + 3 * n * (math.exp(a) - 1) + 3 * n * n * a + n**3 * (1 - math.exp(-a))) / n**2
        gaps.append(abs(closed / t - 1))
    both, held = mutual_reinforcement(end=1e8), mutual_reinforcement(learn_value=False)
    drained = both.value[-1] < 1e-3 and abs(mutual_reinforcement(learn_sink=False).sink[-1]) == 0
    own = max(max(gaps), abs(both.growth - 0.5)) if drained else 1.0
    return own, abs(held.growth - 0.5)


@check(
    "active-dormant-heads",
    "data: tokens behind triggers that are not the one before; others against their bigrams",
    below=0.06,
    control="no triggers",
)
def _() -> tuple[float, float]:
    task = backcopy()

    def wrong(ids: Tensor) -> float:
        behind = torch.isin(ids[:, 1:-1], task.triggers)
        copied = float((ids[:, 2:] != ids[:, :-2])[behind].double().mean())
        seen = torch.zeros_like(task.table)
        seen.index_put_((ids[:, 1:-1][~behind], ids[:, 2:][~behind]), torch.ones(int((~behind).sum())), accumulate=True)
        rows = seen.sum(1) > 2000
        return copied + float((seen / seen.sum(1, keepdim=True).clamp_min(1) - task.table)[rows].abs().max())

    free = type(task)(task.table, torch.tensor([], dtype=torch.long))
    ids = task.draw(1000, 64, torch.Generator().manual_seed(3))
    p = stationary(task.table)
    frequent = set(task.triggers.tolist()) == set(p.topk(3).indices.tolist()) and naive.gap(p @ task.table, p) < 1e-5
    letters = text_bigrams("abcab")
    table = naive.gap(letters[1], torch.tensor([0, 0, 1.0, 0])) + naive.gap(letters[0], torch.tensor([0, 0.4, 0.4, 0.2]))
    start = not bool(torch.isin(ids[:, 1], task.triggers).any()) and not bool(ids[:, 0].any())
    return wrong(ids) + table if frequent and start else 1.0, wrong(free.draw(1000, 64, torch.Generator().manual_seed(3)))


@check(
    "active-dormant-heads",
    "report of two layers and four heads equals loops over rows; forced heads give rows of one weight, or none",
    below=1e-5,
    control="all rows counted alike",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    model = BackcopyModel(25, 32, layers=2, heads=2, length=32, mlp=False).to(F64)
    ids, active = (x[:4, :20] for x in probe())
    found = sink_report(model, ids, active, residual=True)
    with read(model, ["weights", "v", "logits", "residual_out"]) as seen:
        model(ids)
    gaps, alike = [], []
    for layer in range(2):
        w, v, s, h = (seen[name, layer] for name in ("weights", "v", "logits", "residual_out"))
        for head in range(2):
            rows: dict[str, list[float]] = {"dormant": [], "active": [], "previous": [], "gap": []}
            for b in range(4):
                for i in range(2, 20):
                    rows["active" if active[b, i] else "dormant"].append(float(w[b, head, i, 0]))
                    if active[b, i]:
                        rows["previous"].append(float(w[b, head, i, i - 1]))
                    else:
                        rows["gap"].append(float(s[b, head, i, 0] - s[b, head, i, 1:i].mean()))
            norms = v[:, head].norm(dim=-1)
            truth = {name: sum(x) / len(x) for name, x in rows.items()} | {
                "value": float(norms[:, 0].mean() / norms[:, 1:].mean()),
                "total": 1.0,
            }
            gaps += [abs(float(getattr(found, name).scores[layer, head]) - value) for name, value in truth.items()]
            alike.append(abs(sum(rows["dormant"] + rows["active"]) / (4 * 18) - truth["dormant"]))
        assert found.residual is not None
        gaps.append(abs(float(found.residual[layer]) - float(h[:, 0].norm(dim=-1).mean() / h[:, 1:].norm(dim=-1).mean())))
    for kind, key in (("sink", [0] * 6), ("previous", [0, 0, 1, 2, 3, 4]), ("identity", list(range(6))), ("zero", None)):
        with forced(model, kind, layers=[1], heads=[1]), read(model, ["weights", "heads", "v"], layers=[1]) as after:
            model(ids[:, :6])
        out = after["heads", 1][:, 1]
        truth_out = torch.zeros_like(out) if key is None else after["v", 1][:, 1, key]
        gaps += [naive.gap(out, truth_out), naive.gap(after["weights", 1][0, 0].sum(-1), torch.ones(6, dtype=F64))]
    with forced(model, "no_value"), read(model, "v") as after:
        model(ids)
    gaps.append(float(after["v", 0][:, :, 0].abs().max()))
    return max(gaps), max(alike)
