"""Checks of mamba-rank-analysis."""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn, joined, silu, split
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.zoo.linear.mamba_rank_analysis import (
    SelectiveSSM,
    VisionMamba,
    binary_auc,
    dino_loss,
    dino_run,
    effective_rank,
    mixing_ranks,
    rank_report,
    token_mixing_matrix,
)


@check(
    "mamba-rank-analysis",
    "64 tokens, state 8: rank misses (linear 8; Mamba at least 60 whole, at most 8 across cuts; softmax 64)",
    below=0,
    control="Mamba's matrix without decay",
)
def _() -> tuple[float, float]:
    found = mixing_ranks()
    bad = [found["linear"].numerical != 8, found["mamba"].numerical < 60, found["mamba"].off_diagonal > 8, found["softmax"].numerical != 64]
    bad += [found["softmax"].off_diagonal < 28, found["mamba-bidirectional"].off_diagonal > 8]
    layer = SelectiveSSM(16, 8).double()
    delta, _, b, c = layer.parts(torch.randn(1, 64, 16, dtype=F64))
    flat = (c @ (b.mT)) * delta.mT[:, 0, None]
    return sum(bad), float(torch.linalg.matrix_rank(flat[0]) < 60)


def scan_by_hand(layer: SelectiveSSM, x: Tensor, way: int, decays: bool = True) -> Tensor:
    """h_n <- exp(delta a_n) h_n + delta b_n x, y = sum_n c_n h_n, a channel at a time; delta, b and c linear in x."""
    made = x @ layer.read[way].weight.T + layer.read[way].bias  # type: ignore[operator, union-attr]
    dim, count = x.shape[2], layer.state
    delta, b, c = torch.log(1 + torch.exp(made[..., :dim])), made[..., dim : dim + count], made[..., dim + count :]
    out = torch.zeros_like(x)
    for d in range(dim):
        h = torch.zeros(len(x), count, dtype=x.dtype)
        for t in range(x.shape[1]):
            step = delta[:, t, d, None]
            fade = torch.exp(-step * torch.exp(layer.log_a[way, d])) if decays else 1.0
            h = fade * h + step * b[:, t] * x[:, t, d, None]
            out[:, t, d] = (c[:, t] * h).sum(-1)
    return out


@check(
    "mamba-rank-analysis",
    "the selective layer and M x, one way and both == the recurrence by hand; softmax's and linear attention's M x their layers",
    below=1e-10,
    control="without decay",
)
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for both in (False, True):
        layer, x = drawn(SelectiveSSM(6, 4, both)), torch.randn(2, 17, 6, dtype=F64)
        truth, flat = (
            scan_by_hand(layer, x, 0, d) + (scan_by_hand(layer, x.flip(1), 1, d).flip(1) if both else 0.0) for d in (True, False)
        )
        m = token_mixing_matrix(layer, x)
        own += [naive.gap(torch.einsum("bdts,bsd->btd", m, x), truth), naive.gap(layer(x), truth)]
        other = min(other, naive.gap(layer(x), flat))
    for name in ("softmax", "slab"):
        attention, x = Attention(16, 2, name).double(), torch.randn(2, 11, 16, dtype=F64)
        m = token_mixing_matrix(attention, x)
        own.append(naive.gap(attention.out(joined(m @ split(attention.v(x), 2))), attention(x)))
    return max(own), other


@check(
    "mamba-rank-analysis",
    "effective rank: exp of the entropy of singular values; of k equal ones k; the report's blocks below each cut",
    below=1e-6,
    control="of twice as many",
)
def _() -> tuple[float, float]:
    turn, back = (torch.linalg.qr(torch.randn(12, 12, dtype=F64))[0] for _ in range(2))

    def rank(values: Tensor) -> float:
        return float(effective_rank(turn[:, : len(values)] * values @ back[: len(values)]))

    p = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    uneven = abs(rank(7 * p) - math.exp(-float((p * p.log()).sum())))
    m = torch.randn(12, 12, dtype=F64)
    m[6:, :6] = torch.outer(torch.randn(6, dtype=F64), torch.randn(6, dtype=F64))
    report = rank_report(m, cuts=3)
    cuts = [at for at, _ in report.curve] == [3, 6, 9] and report.numerical == 12 and report.off_diagonal == 3
    found = max(
        abs(rank(torch.ones(5, dtype=F64)) - 5), uneven, abs(report.curve[1][1] - 1), abs(report.effective - float(effective_rank(m)))
    )
    return found if cuts else math.inf, abs(rank(torch.ones(10, dtype=F64)) - 5)


@check(
    "mamba-rank-analysis",
    "the distillation loss == cross-entropy of the student with the centred, sharper teacher in loops; none of it reaches the teacher",
    below=1e-12,
    control="without the centre",
)
def _() -> tuple[float, float]:
    student, teacher, centre = torch.randn(4, 6, dtype=F64), torch.randn(4, 6, dtype=F64, requires_grad=True), torch.randn(6, dtype=F64)

    def truth(centre: Tensor) -> float:
        total = 0.0
        for i in range(4):
            t = torch.exp((teacher[i] - centre) / 0.04)
            s = torch.exp(student[i] / 0.1)
            total -= float(((t / t.sum()) * (s / s.sum()).log()).sum().detach()) / 4
        return total

    loss = dino_loss(student.requires_grad_(), teacher, centre)
    free = torch.autograd.grad(loss, teacher, allow_unused=True)[0] is None
    return abs(float(loss.detach()) - truth(centre)) if free else math.inf, abs(float(loss.detach()) - truth(0 * centre))


@check(
    "mamba-rank-analysis",
    "the vision model == patches, places, x + W_o (mixer(norm x) silu(gate(norm x))), by hand",
    below=1e-9,
    control="without the gate",
)
def _() -> tuple[float, float]:
    model, image = drawn(VisionMamba(1, 6, 2, 4, 4, 3)), torch.randn(2, 1, 8, 8, dtype=F64)
    patches = image.unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def truth(gated: bool) -> Tensor:
        x = patches @ model.patch.weight.flatten(1).T + model.patch.bias + model.place  # type: ignore[operator]
        for norm, mixer, gate, out in zip(model.norms, model.mixers, model.gates, model.outs, strict=True):
            y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
            z = scan_by_hand(mixer, y, 0) + scan_by_hand(mixer, y.flip(1), 1).flip(1)  # type: ignore[arg-type]
            x = x + out(z * silu(gate(y)) if gated else z)
        return x

    return naive.gap(model(image), truth(True)), naive.gap(model(image), truth(False))


@check(
    "mamba-rank-analysis",
    "binary AUC: 1 for the mask, 1/2 for a constant, 0 inverted, unchanged by exp: largest miss",
    below=1e-9,
    control="accuracy at the threshold 1/2",
)
def _() -> tuple[float, float]:
    mask = torch.rand(3, 9, 9) > 0.6
    a = torch.randn(3, 9, 9, dtype=F64) + mask
    misses = [abs(binary_auc(mask.double(), mask) - 1), abs(binary_auc(0 * a, mask) - 0.5), abs(binary_auc(-mask.double(), mask))]
    misses.append(abs(binary_auc(a, mask) - binary_auc(torch.exp(a), mask)))

    def accuracy(a: Tensor) -> float:
        return float(((a > 0.5) == mask).double().mean())

    return max(misses), abs(accuracy(a) - accuracy(torch.exp(a)))


@check(
    "mamba-rank-analysis",
    "40 steps of self-distillation on shapes, three seeds: what the binary AUC of feature norms gains, the median",
    above=0.01,
    control="steps of length zero",
)
def _() -> tuple[float, float]:
    def gain(steps: int, lr: float) -> float:
        found = [dino_run(steps=steps, lr=lr, seed=seed) for seed in range(3)]
        return statistics.median(run.auc_after - run.auc_before for run in found)

    return gain(40, 1e-3), gain(2, 0.0)
