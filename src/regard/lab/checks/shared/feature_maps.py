"""Normalised kernel attention from given features, in loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.lab.checks.shared.comparing import F64


def cosine_matrix(q: Tensor, k: Tensor, horizon: float, width: float = math.pi / 2) -> Tensor:
    i, j = torch.arange(q.shape[-2], dtype=F64)[:, None], torch.arange(k.shape[-2], dtype=F64)
    return (q.relu() @ k.relu().transpose(-1, -2)) * torch.cos(width * (i - j) / horizon)


def normalised(a: Tensor, v: Tensor) -> Tensor:
    return (a @ v) / a.sum(-1, keepdim=True).clamp_min(1e-6)


def naive_kernel(phi_q: Tensor, phi_k: Tensor, v: Tensor, eps: float = 0.0) -> Tensor:
    """Causal normalised kernel attention, a loop over tokens; eps: added to the divisor."""
    out = torch.zeros(*phi_q.shape[:-1], v.shape[-1], dtype=v.dtype)
    for t in range(phi_q.shape[-2]):
        a = torch.einsum("bhf,bhjf->bhj", phi_q[:, :, t], phi_k[:, :, : t + 1])
        out[:, :, t] = torch.einsum("bhj,bhje->bhe", a, v[:, :, : t + 1]) / (a.sum(-1, keepdim=True) + eps)
    return out
