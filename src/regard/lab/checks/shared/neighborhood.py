"""Neighbourhoods along an axis, by the rule as written."""

from __future__ import annotations

import torch
from torch import Tensor


def brute(n: int, kernel: int, stride: int, dilation: int, causal: bool) -> Tensor:
    """One axis of generalized neighbourhood attention, a loop over queries as the rule is written."""
    seen = torch.zeros(n, n, dtype=torch.bool)
    for x in range(n):
        group, members = x % dilation, len(range(x % dilation, n, dilation))
        at = x // dilation
        if causal:
            leader = min((at // stride) * stride + stride - 1, members - 1)
            window = range(max(0, leader - kernel + 1), at + 1)
        else:
            leader = min((at // stride) * stride + stride // 2, members - 1)
            right = kernel // 2 + kernel % 2 - 1
            start = max(leader - kernel // 2, 0) + (members - right - leader - 1 if leader + right >= members else 0)
            window = range(start, start + kernel)
        for y in window:
            seen[x, group + y * dilation] = True
    return seen
