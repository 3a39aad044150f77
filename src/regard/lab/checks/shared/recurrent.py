"""A recurrence in its three forms, and its gradients against a loop's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regard.algebra import Causal, Recurrent
from regard.engine import recurrent as scans
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64


def qkv(n: int = 40, d: int = 8, e: int = 5, m: int | None = None, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, heads, n, d, dtype=F64), torch.randn(1, heads, m or n, d, dtype=F64), torch.randn(1, heads, m or n, e, dtype=F64)


def scan_of(mechanism: Recurrent, q: Tensor, k: Tensor, v: Tensor, **inputs: Tensor) -> scans.Scan:
    return scans.pose(mechanism, Causal(), q, k, v, None, inputs)


def forms(mechanism: Recurrent, q: Tensor, k: Tensor, v: Tensor, chunk: int = 16, **inputs: Tensor) -> list[Tensor]:
    """(parallel, chunk, step) outputs."""
    scan = scan_of(mechanism, q, k, v, **inputs)
    return [scans.run(scan, mode, None, chunk)[0] for mode in ("parallel", "chunk", "step")]


def gradient_gap(mechanism: Recurrent, q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Tensor], truth: Callable[..., Tensor]) -> float:
    """Largest difference between gradients of the chunked form and of a token loop."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, *inputs.values())]
    named = dict(zip(inputs, leaves[3:], strict=True))
    seed = torch.randn(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    out = scans.run(scan_of(mechanism, *leaves[:3], **named), "chunk", None, 16)[0]
    own = torch.autograd.grad((out * seed).sum(), leaves)
    loop = torch.autograd.grad((truth(*leaves) * seed).sum(), leaves)
    return max(naive.gap(a, b) for a, b in zip(own, loop, strict=True))
