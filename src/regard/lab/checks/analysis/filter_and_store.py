"""Checks of filter-and-store."""

from __future__ import annotations

import functools
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.verification import check
from regard.tasks.facts import Facts
from regard.zoo.analysis.filter_and_store import Acquired, FilterStore, acquire

SEEDS = (0, 1, 2)


@functools.cache
def pretrained(multiplicity: int, seed: int, leak: float = 0.0, readout: str = "mlp") -> Acquired:
    """A shorter run than the defaults', on a corpus of their sizes."""
    facts = Facts(multiplicity=multiplicity, seed=seed)
    return acquire(facts, hidden=128, steps=(350, 0), lr=(4e-3, 0.0), every=25, leak=leak, readout=readout, seed=seed)


@functools.cache
def asked(multiplicity: int, share: float, seed: int, leak: float = 0.0, rank: int | None = None, readout: str = "mlp") -> Acquired:
    start = pretrained(multiplicity, seed, leak, readout)
    return acquire(start.facts, share, steps=(0, 120), lr=(0.0, 2e-3), rank=rank, seed=seed, start=start)


def unseen(multiplicity: int, share: float) -> float:
    return median(asked(multiplicity, share, seed).unseen for seed in SEEDS)


@check(
    "filter-and-store",
    "subjects never asked about in fine-tuning, one paraphrase and a tenth asked about: answered (of three seeds; pretraining fits in all)",
    below=0.5,
    control="questions leaked into pretraining",
)
def _() -> tuple[float, float]:
    fits = max(pretrained(m, seed).loss for m in (1, 4) for seed in SEEDS) < 0.1 and min(asked(1, 0.1, s).seen for s in SEEDS) == 1
    return unseen(1, 0.1) if fits else 1.0, asked(1, 0.1, 0, leak=0.2).unseen


@check(
    "filter-and-store",
    "the same with four paraphrases and half of the subjects asked about; a tenth lies between",
    above=0.85,
    control="one paraphrase, a tenth",
)
def _() -> tuple[float, float]:
    low, between, high = unseen(1, 0.1), unseen(4, 0.1), unseen(4, 0.5)
    return high if low + 0.1 < between < high - 0.1 else 0.0, low


@check("filter-and-store", "filtering: mean attention on a filler when pretraining ends", below=0.15, control="before it: evenly, 1/4")
def _() -> tuple[float, float]:
    runs = [pretrained(4, seed) for seed in SEEDS]
    kept = min(r.subject[-1] for r in runs) > 0.5 and all(abs(2 * r.filler[-1] + r.subject[-1] + r.relation[-1] - 1) < 1e-5 for r in runs)
    return max(r.filler[-1] for r in runs) if kept else 1.0, runs[0].filler[0]


@check(
    "filter-and-store",
    "fine-tuning of rank 8: the same two arms apart by",
    above=0.4,
    control="the M=4 arm less an M=1 arm with leaked questions, both fine-tuned whole",
)
def _() -> tuple[float, float]:
    gap = asked(4, 0.5, 0, rank=8).unseen - asked(1, 0.1, 0, rank=8).unseen
    return gap, asked(4, 0.5, 0).unseen - asked(1, 0.1, 0, leak=0.2).unseen


@check("filter-and-store", "the layer: loops over tokens, values and gradients in float64", below=1e-9, control="scores without 1/sqrt(d)")
def _() -> tuple[float, float]:
    torch.manual_seed(3)
    found, wrong = 0.0, 0.0
    for readout in ("mlp", "linear"):
        model = FilterStore(11, 6, 5, readout).to(F64)
        nn.init.normal_(model.kq.weight)
        ids = torch.randint(11, (3, 5))

        def by_hand(scale: float, model: FilterStore = model, ids: torch.Tensor = ids, readout: str = readout) -> torch.Tensor:
            out = []
            for row in ids:
                h = [model.embed.weight[t] for t in row]
                e = torch.stack([(h[-1] @ model.kq.weight @ x) * scale for x in h]).exp()
                z = sum((model.value.weight @ x * e[t] / e.sum() for t, x in enumerate(h)), torch.zeros(6, dtype=F64))
                if readout == "mlp":
                    w1, b1, w2, b2 = model.readout.parameters()
                    out.append(w2 @ (w1 @ z + b1).clamp_min(0) + b2)
                else:
                    w, b = model.readout.parameters()
                    out.append(w @ z + b)
            return torch.stack(out)

        leaves = tuple(model.parameters())
        found = max(found, gap_with_gradients(model(ids), by_hand(6**-0.5), leaves))
        wrong = max(wrong, naive.gap(model(ids), by_hand(1.0)))
    return found, wrong


@check("filter-and-store", "low-rank fine-tuning: rank of each matrix's change, and change of everything else", below=2.5, control="full")
def _() -> tuple[float, float]:
    facts, ranks = Facts(8, 4, 3, 2, 2), []
    start = acquire(facts, dim=12, hidden=10, steps=(3, 0), batch=16)
    for rank in (2, None):
        end = acquire(facts, dim=12, hidden=10, steps=(0, 5), lr=(0.0, 1e-2), batch=16, rank=rank, start=start).model
        pairs = [(a, b) for a, b in zip(start.model.modules(), (m for m in end.modules()), strict=False) if isinstance(a, nn.Embedding)]
        change = [(b.weight - a.weight).abs().max() > 0 for a, b in pairs]  # type: ignore[operator]
        matrices = [(start.model.kq, end.kq), (start.model.value, end.value), (start.model.readout[0], end.readout[0])]  # type: ignore[index]
        most = max(int(torch.linalg.matrix_rank((b.weight - a.weight).detach(), rtol=1e-3)) for a, b in matrices)
        least = min(int(torch.linalg.matrix_rank((b.weight - a.weight).detach(), rtol=1e-3)) for a, b in matrices)
        ranks.append(float(most if least > 0 else 99) + 50 * (rank is not None and any(change)))
    return ranks[0], ranks[1]


@check(
    "filter-and-store",
    "the corpus: sequences that break its rules, of 400 (place, paraphrase, answer, filler)",
    below=0.5,
    control="other facts",
)
def _() -> tuple[float, float]:
    facts, other = Facts(multiplicity=3, seed=1), Facts(multiplicity=3, seed=2)
    ids, answer = facts.statements(400, torch.Generator().manual_seed(0))
    asks, replies = facts.questions(torch.arange(64), torch.Generator().manual_seed(0))

    def broken(by: Facts) -> float:
        wrong = 0
        for row, a in [*zip(ids.tolist(), answer.tolist(), strict=True), *zip(asks.tolist(), replies.tolist(), strict=True)]:
            s, r = row[1], row[3] - 64
            said = r in by.phrases[s].tolist() or r == 24
            wrong += not (s < 64 and said and a == 64 + 24 + 1 + 8 + int(by.answer[s]) and all(89 <= f < 97 for f in (row[0], row[2])))
        return float(wrong)

    spread = ids[:, 0].unique().numel() == 8 and len({tuple(x) for x in ids[:, [1, 3]].tolist()}) > 150 and bool((asks[:, 3] == 88).all())
    plain = bool((ids[:, 3] != 88).all()) and bool((facts.statements(50, torch.Generator(), leak=1.0)[0][:, 3] == 88).all())
    loss = float(F.cross_entropy(torch.zeros(2, facts.vocab), answer[:2]).exp().round())
    return broken(facts) + 400 * (not (spread and plain and loss == 113)), broken(other)
