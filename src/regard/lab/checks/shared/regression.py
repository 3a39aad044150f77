"""Ridge regressions, one for every query, by least squares."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ridge_fits(
    q: Tensor, k: Tensor, v: Tensor, ridge: float, width: float | None = None, growing: bool = False, causal: bool = True
) -> Tensor:
    """For each query an explicit weighted ridge regression with a free intercept, by least squares on augmented rows. width: of a Gaussian
    kernel in place of exponentials of products; growing: all weights one."""
    out = torch.zeros_like(v)
    d = q.shape[-1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                count = i + 1 if causal else k.shape[2]
                keys, values = k[b, h, :count], v[b, h, :count]
                square = (keys - q[b, h, i]).square().sum(-1)
                s = keys @ q[b, h, i] / math.sqrt(d) if width is None else -square / (2 * width**2)
                w = torch.ones_like(s) if growing else torch.exp(s - s.max())
                design = torch.cat((torch.ones(count, 1, dtype=q.dtype), keys - q[b, h, i]), -1) * w.sqrt()[:, None]
                extra = torch.cat((torch.zeros(d, 1, dtype=q.dtype), torch.eye(d, dtype=q.dtype) * ridge**0.5), -1)
                right = torch.cat((values * w.sqrt()[:, None], torch.zeros(d, v.shape[-1], dtype=q.dtype)))
                out[b, h, i] = torch.linalg.lstsq(torch.cat((design, extra)), right).solution[0]
    return out
