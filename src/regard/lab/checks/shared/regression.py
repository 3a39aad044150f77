"""Ridge regressions, one for every query, by least squares."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ridge_fits(q: Tensor, k: Tensor, v: Tensor, ridge: float, rbf: bool = False, growing: bool = False) -> Tensor:
    """For each query an explicit weighted ridge regression with a free intercept, by least squares on augmented rows."""
    out = torch.zeros_like(v)
    d = q.shape[-1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys, values = k[b, h, : i + 1], v[b, h, : i + 1]
                s = -(keys - q[b, h, i]).square().sum(-1) / 2 if rbf else keys @ q[b, h, i] / math.sqrt(d)
                w = torch.ones_like(s) if growing else torch.exp(s - s.max())
                design = torch.cat((torch.ones(i + 1, 1, dtype=q.dtype), keys - q[b, h, i]), -1) * w.sqrt()[:, None]
                extra = torch.cat((torch.zeros(d, 1, dtype=q.dtype), torch.eye(d, dtype=q.dtype) * ridge**0.5), -1)
                right = torch.cat((values * w.sqrt()[:, None], torch.zeros(d, v.shape[-1], dtype=q.dtype)))
                out[b, h, i] = torch.linalg.lstsq(torch.cat((design, extra)), right).solution[0]
    return out
