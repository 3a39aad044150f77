"""Checks of mamba-rank-analysis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.linear.mamba_rank_analysis import (
    SelectiveSSM,
    binary_auc,
    dino_run,
    mixing_ranks,
    selective_matrix,
    selective_scan,
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


@check("mamba-rank-analysis", "M x == the sequential scan, one way and both", below=1e-10, control="a matrix without the cumulative decay")
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for both in (False, True):
        layer, x = SelectiveSSM(6, 4, both).double(), torch.randn(2, 30, 6, dtype=F64)
        m = token_mixing_matrix(layer, x)
        own.append(naive.gap(torch.einsum("bdts,bsd->btd", m, x), layer(x)))
        delta, a, b, c = layer.parts(x)
        y = selective_scan(x, delta, a, b, c)
        flat = selective_matrix(delta, 0 * a, b, c)
        other = min(other, naive.gap(torch.einsum("bdts,bsd->btd", flat, x), y))
    return max(own), other


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
    "mamba-rank-analysis", "100 steps of self-distillation on shapes: binary AUC of feature norms", above=0.93, control="before training"
)
def _() -> tuple[float, float]:
    found = dino_run()
    return found.auc_after, found.auc_before
