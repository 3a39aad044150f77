"""PNA's aggregations a node at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def gathered(a: Tensor, v: Tensor) -> Tensor:
    """PNA's four aggregations a node at a time."""
    rows = []
    for i in range(a.shape[0]):
        degree = float(a[i].detach().sum()) or 1.0
        near = [j for j in range(a.shape[0]) if a[i, j] > 0]
        total = sum((a[i, j] * v[j] for j in range(a.shape[0])), torch.zeros_like(v[0]))
        squares = sum((a[i, j] * v[j] ** 2 for j in range(a.shape[0])), torch.zeros_like(v[0]))
        largest = torch.stack([v[j] for j in near]).amax(0) if near else torch.zeros_like(v[0])
        rows.append(torch.cat((total, total / degree, largest, (squares / degree - (total / degree) ** 2).clamp_min(0))))
    return torch.stack(rows)
