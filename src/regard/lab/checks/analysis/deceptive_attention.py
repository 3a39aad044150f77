"""Checks of deceptive-attention."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gradients
from regard.lab.verification import check
from regard.tasks.training import fit
from regard.zoo.analysis.deceptive_attention import (
    BiLSTMAttention,
    ClsTransformer,
    Deception,
    EmbAttention,
    attention_penalty,
    deception_report,
    train_translator,
    translation,
)


@check(
    "deceptive-attention",
    "penalty over heads, queries and examples by loops, values and gradients, mean and max",
    below=1e-10,
    control="log of the mass",
)
def _() -> tuple[float, float]:
    a = torch.randn(3, 2, 4, 5, dtype=F64).softmax(-1).requires_grad_()
    mask = (torch.rand(3, 5) > 0.5).long()
    mask[0] = 0
    gaps, other = [], 0.0
    for reduce in ("mean", "max"):
        terms, wrong = [], []
        for b in range(3):
            for q in range(4):
                mass = [sum((a[b, h, q, t] for t in range(5) if mask[b, t]), torch.zeros((), dtype=F64)) for h in range(2)]
                logs = [torch.log(1 - m + 1e-12) for m in mass]
                terms.append(-0.3 * (sum(logs) / 2 if reduce == "mean" else min(logs, key=lambda x: float(x.detach()))))
                wrong.append(0.3 * torch.log(mass[0] + 1e-12))
        truth = torch.stack(terms).mean()
        found = attention_penalty(a, mask, 0.3, reduce)
        gaps += [naive.gap(found, truth), naive.gap(gradients(found, (a,))[0], gradients(truth, (a,))[0])]
        other = naive.gap(found, torch.stack(wrong).mean())
    rows = torch.tensor([[0.25, 0.75]], dtype=F64)
    gaps.append(abs(float(attention_penalty(rows, torch.tensor([[0, 1]]), 2.0)) + 2 * math.log(0.25 + 1e-12)))
    own = attention_penalty(a[:, 0], torch.eye(5)[:4].expand(3, -1, -1), 1.0)
    gaps.append(naive.gap(own, -torch.log(1 - a[:, 0].diagonal(0, 1, 2) + 1e-12).mean()))
    return max(gaps), other


def planted(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """12 tokens, one of which (2 or 3) tells the label: (ids, labels, impermissible)."""
    ids, labels = torch.randint(4, 24, (count, 12), generator=generator), torch.randint(2, (count,), generator=generator)
    at = torch.randint(12, (count, 1), generator=generator)
    return ids.scatter(1, at, 2 + labels[:, None]), labels, torch.zeros(count, 12, dtype=torch.long).scatter(1, at, 1)


@functools.cache
def trained(lam: float, kind: str = "embeddings") -> Deception:
    torch.manual_seed(0)
    model = EmbAttention(24, 32) if kind == "embeddings" else BiLSTMAttention(24, 32, 16)

    def loss(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        logits, alpha = model(batch[0])
        return F.cross_entropy(logits, batch[1]) + attention_penalty(alpha, batch[2], lam)

    fit(model, lambda g: planted(64, g), loss, 500 if kind == "embeddings" else 100, lr=5e-3)
    return deception_report(model, *planted(500, torch.Generator().manual_seed(77)))


@check(
    "deceptive-attention",
    "embeddings: attention on the telling token under lam = 0.1 and 1, if accuracy is 0.98 with it and 0.6 without it at most",
    below=0.2,
    control="lam = 0",
)
def _() -> tuple[float, float]:
    runs = [trained(lam) for lam in (0.1, 1.0)]
    good = all(run.accuracy >= 0.98 and run.blocked <= 0.6 for run in (*runs, trained(0.0))) and runs[1].mass < runs[0].mass
    return runs[0].mass if good else 1.0, trained(0.0).mass


@check("deceptive-attention", "lam = 1: length of the telling tokens' embeddings over the others'", above=1.3, control="before training")
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    untrained = deception_report(EmbAttention(24, 32), *planted(500, torch.Generator().manual_seed(77)))
    return trained(1.0).norms, untrained.norms


@check("deceptive-attention", "BiLSTM: attention on the telling token under lam = 1, accuracy at least 0.98", below=0.1, control="lam = 0")
def _() -> tuple[float, float]:
    own = trained(1.0, "lstm")
    return own.mass if own.accuracy >= 0.98 else 1.0, trained(0.0, "lstm").mass


@check(
    "deceptive-attention",
    "transformer, flow blocked: change of the last stream's permissible tokens when impermissible ones change, and of weights from softmax by hand",
    below=1e-6,
    control="flow free",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    found = []
    for blocked in (True, False):
        torch.manual_seed(0)
        model = ClsTransformer(24, 32, 2, blocked=blocked)
        ids, _, mask = planted(4, torch.Generator().manual_seed(1))
        ids = F.pad(ids, (1, 0), value=1)
        mask = F.pad(mask, (1, 0))
        other = torch.where(mask.bool(), 23, ids)
        kept: list[Tensor] = []
        handle = model.blocks[-1].norm2.register_forward_pre_hook(lambda _, args: kept.append(args[0]))  # type: ignore[union-attr]  # noqa: B023
        (logits, alpha), (moved, _) = model(ids, mask), model(other, mask)
        handle.remove()
        free = ~mask.bool()
        free[:, 0] = False
        gap = float((kept[0] - kept[1])[free].abs().max())
        reads = float((logits - moved).abs().max()) > 1e-4 and naive.gap(alpha.sum(-1), torch.ones(4, 2, 1)) < 1e-5
        penal = attention_penalty(alpha, mask, 1.0)
        found.append(gap if reads and float(penal) > 0 else 1.0)
    return found[0], found[1]


@check(
    "deceptive-attention",
    "translators of reversed words, lam = 1: attention on the aligned word, if accuracy is 0.9 and above that without attention",
    below=0.2,
    control="lam = 0",
)
def _() -> tuple[float, float]:
    (right, mass), (_, open_mass), (without, _) = (
        train_translator("reverse", 1.0),
        train_translator("reverse", 0.0),
        train_translator("reverse", 0.0, "none", steps=100),
    )
    words = [translation(kind, 1, 5, 9, torch.Generator().manual_seed(0)) for kind in ("copy", "reverse", "flip")]
    orders = [
        torch.equal(target[0], source[0, order])
        for (source, target, _), order in zip(words, ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 0, 3, 2, 4]), strict=True)
    ]
    return mass if right >= 0.9 and right >= without and all(orders) else 1.0, open_mass
