"""Independent formulas, written from the papers one row at a time in float64. Checks and tests hold the engine to these."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RowWeights = Callable[[Tensor], Tensor]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: RowWeights,
    visible: Callable[[int, int], bool] | None = None,
    scale: float | None = None,
    score: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Loop over batch, head and query: scores of the visible keys, `weights` of that row, weighted sum. visible(i, j) on absolute positions."""
    b, h, n, d = q.shape
    group = h // k.shape[1]
    offset = k.shape[2] - n
    scale = d**-0.5 if scale is None else scale
    out = torch.zeros(b, h, n, v.shape[-1], dtype=torch.float64)
    for batch in range(b):
        for head in range(h):
            keys, values = k[batch, head // group].double(), v[batch, head // group].double()
            for row in range(n):
                seen = [j for j in range(k.shape[2]) if visible is None or visible(row + offset, j)]
                if not seen:
                    continue
                query = q[batch, head, row].double()
                s = torch.stack([score(query, keys[j]) if score else scale * (query * keys[j]).sum() for j in seen])
                out[batch, head, row] = weights(s) @ values[seen]
    return out


def causal(i: int, j: int) -> bool:
    return j <= i


def softmax(s: Tensor) -> Tensor:
    e = torch.exp(s - s.max())
    return e / e.sum()


def projection(z: Tensor) -> Tensor:
    """Euclidean projection onto the simplex by bisection on the threshold (independent of sorting and of Newton)."""
    low, high = z.max() - 1, z.max()
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (z - middle).clamp_min(0).sum() >= 1 else (low, middle)
    return (z - low).clamp_min(0)


def entmax(z: Tensor, alpha: float) -> Tensor:
    """alpha-entmax by bisection on tau in ((alpha-1) z - tau)_+^(1/(alpha-1))."""
    x = (alpha - 1) * z
    low, high = x.max() - 1, x.max()
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if ((x - middle).clamp_min(0) ** (1 / (alpha - 1))).sum() >= 1 else (low, middle)
    return (x - low).clamp_min(0) ** (1 / (alpha - 1))


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, beta: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token loop of S <- diag(e^g) S; S += k u^T with u = v, or beta (v - S^T k); o = S^T q. g (B, H, L, F or 1). Returns (o, S)."""
    b, h, n, f = k.shape
    s = torch.zeros(b, h, f, v.shape[-1], dtype=q.dtype) if state is None else state.clone()
    out = []
    for t in range(n):
        if log_decay is not None:
            s = torch.exp(log_decay[:, :, t]).unsqueeze(-1) * s
        u = v[:, :, t]
        if beta is not None:
            u = beta[:, :, t].unsqueeze(-1) * (u - torch.einsum("bhfe,bhf->bhe", s, k[:, :, t]))
        s = s + torch.einsum("bhf,bhe->bhfe", k[:, :, t], u)
        out.append(torch.einsum("bhfe,bhf->bhe", s, q[:, :, t]))
    return torch.stack(out, 2), s


def gap(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite where one is not finite."""
    return float((a.detach() - b.detach()).abs().nan_to_num(nan=float("inf"), posinf=float("inf")).max())
