"""The quadratic form: the recurrence as a matrix of weights. Simple enough to be checked by eye, in any dtype."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .pose import Lift, Scan


def decay_matrix(total: Tensor) -> Tensor:
    """exp(G_i - G_j) for j <= i, else 0, from running sums G (..., L, 1); exponents are never positive."""
    gap = total - total.transpose(-1, -2)
    past = torch.ones(gap.shape[-2:], dtype=torch.bool, device=gap.device).tril()
    return torch.exp(gap.masked_fill(~past, float("-inf")))


def pairs(q: Tensor, k: Tensor, lift: Lift | None) -> Tensor:
    """phi_q(q).phi_k(k) for every pair."""
    s = q @ k.transpose(-1, -2)
    return s if lift is None else lift.kernel(s)


def running(decay: Tensor, length: int) -> Tensor:
    """Inclusive sums of log decays along the sequence."""
    return decay.expand(*decay.shape[:-2], length, decay.shape[-1]).cumsum(-2)


def pair_weights(scan: Scan) -> Tensor:
    """W with o = W v for additive writes: W_ij = sum_c q_ic k_jc exp(G_ic - G_jc)."""
    total = None if scan.decay is None else running(scan.decay, scan.length)
    if total is None or total.shape[-1] == 1:
        w = pairs(scan.q, scan.k, scan.lift)
        return w * decay_matrix(total) if total is not None else w.tril() if scan.causal else w
    rows = []
    for i in range(scan.length):  # one row at a time: (j, c) is the largest thing in memory
        fade = torch.exp(total[..., i : i + 1, :] - total[..., : i + 1, :])
        row = (scan.q[..., i : i + 1, :] * fade * scan.k[..., : i + 1, :]).sum(-1)
        rows.append(torch.nn.functional.pad(row, (0, scan.length - i - 1)))
    return torch.stack(rows, -2)


def delta_weights(scan: Scan) -> Tensor:
    """W with o = W v for delta writes: tril(Q K^T o D) (I + tril(beta K K^T o D, -1))^-1 diag(beta)."""
    assert scan.beta is not None
    past, overlap = pair_weights(scan), pair_weights(replace(scan, q=scan.k))
    erase = (scan.beta * overlap).tril(-1)
    eye = torch.eye(scan.length, dtype=erase.dtype, device=erase.device)
    strength = torch.diag_embed(scan.beta.squeeze(-1))
    return past @ torch.linalg.solve_triangular(eye + erase, strength, upper=False, unitriangular=True)


def later(x: Tensor) -> Tensor:
    """Row i of x (..., L, D) at i - 1; nothing at the end."""
    return torch.nn.functional.pad(x[..., 1:, :], (0, 0, 0, 1))


def sooner(x: Tensor) -> Tensor:
    """Row i at i + 1; zeros at the start."""
    return torch.nn.functional.pad(x[..., :-1, :], (0, 0, 1, 0))


def low_rank_weights(scan: Scan) -> Tensor:
    """W with o = W v of transitions diagonal plus low rank: Q K + Q B (I - A B)^-1 A K, each product causal and faded; a reads one token sooner."""
    assert scan.low is not None
    a, b = scan.low
    reads = replace(scan, q=later(a))
    by_key, by_insert = sooner(pair_weights(reads)), sooner(pair_weights(replace(reads, k=b)))
    eye = torch.eye(scan.length, dtype=by_key.dtype, device=by_key.device)
    erased = torch.linalg.solve_triangular(eye - by_insert, by_key, upper=False, unitriangular=True)
    return pair_weights(scan) + pair_weights(replace(scan, k=b)) @ erased


def parallel(scan: Scan) -> Tensor:
    """o (B, H, L, E), before the readout."""
    if scan.low is not None:
        return low_rank_weights(scan) @ scan.v
    return (pair_weights(scan) if scan.beta is None else delta_weights(scan)) @ scan.v
