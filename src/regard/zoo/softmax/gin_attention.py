"""Graph-aware isomorphic attention: attention maps as adjacency of GIN and PNA layers (id 148; Buehler, 2025).

GIN: y^h = MLP_h(eps X^h + A^h X^h),   PNA: y^h = MLP_h([sum, mean, max, variance over j with A_ij > 0]),   A^h causal attention

`GraphAdapted` puts adapters into a frozen pretrained decoder. Not built: the comparison with LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import row_softmax
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.parts import takes
from regard.taps import edit, read, sites
from regard.taps.points import At

PROCESSES = ("none", "relu", "silu", "softplus", "sharp_softplus", "sigmoid", "binary", "top_k")


class Adjacency(nn.Module):
    """x (B, L, dim) -> causal A (B, H, L, L). kind: "softmax" of q.k sharpen / (temperature sqrt(D)), "raw": those scores themselves, or "mlp":
    w.silu(W [h_i; h_j]). process: what is made of it (see PROCESSES), at `threshold`, `beta` or `top_k`, then masked again.

    differential: A_1 - lambda A_2 with a learned lambda from 0.8 - 0.6 exp(-0.3 depth).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kind: str = "softmax",
        process: str = "none",
        *,
        threshold: float = 0.2,
        beta: float = 10.0,
        top_k: int = 8,
        sharpen: float = 1.0,
        temperature: float = 1.0,
        differential: bool = False,
        depth: int = 0,
    ):
        super().__init__()
        if kind not in ("softmax", "raw", "mlp") or process not in PROCESSES:
            raise RegardError(f"kind={kind!r}, process={process!r}; expected softmax, raw or mlp, and one of {', '.join(PROCESSES)}")
        if dim % heads:
            raise RegardError(f"dim={dim} is not a multiple of heads={heads}")
        self.heads, self.kind, self.process = heads, kind, process
        self.threshold, self.beta, self.top_k, self.factor = threshold, beta, top_k, sharpen / temperature
        maps = 2 if differential else 1
        self.q, self.k = nn.Linear(dim, maps * dim, bias=False), nn.Linear(dim, maps * dim, bias=False)
        width = dim // heads
        self.pair = nn.Parameter(torch.randn(heads, width) / width**0.5) if kind == "mlp" else None
        start = 0.8 - 0.6 * math.exp(-0.3 * depth)
        self.lam = nn.Parameter(torch.full((heads, 1, 1), start)) if differential else None

    def one(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        if self.pair is not None:
            s = torch.stack(
                [(F.silu(q[:, :, i, None] + k) * self.pair[:, None]).sum(-1) for i in range(q.shape[2])], 2
            )  # W [h_i; h_j] = W_1 h_i + W_2 h_j, a row of pairs at a time
        else:
            s = q @ k.transpose(-1, -2) * (self.factor * q.shape[-1] ** -0.5)
        return torch.where(seen, s, 0.0) if self.kind == "raw" else row_softmax(s, seen.expand_as(s))

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        q, k = (
            y.unflatten(-1, (-1, self.heads, x.shape[-1] // self.heads)).movedim(-3, 0).transpose(-3, -2) for y in (self.q(x), self.k(x))
        )
        a = self.one(q[0], k[0], seen)
        a = a if self.lam is None else a - self.lam * self.one(q[1], k[1], seen)
        return torch.where(seen, self.processed(a), 0.0)

    def processed(self, a: Tensor) -> Tensor:
        t, beta = self.threshold, self.beta
        if self.process == "top_k":
            best = a.topk(min(self.top_k, a.shape[-1]), -1)
            return torch.zeros_like(a).scatter(-1, best.indices, best.values)
        return {
            "none": lambda: a,
            "relu": lambda: torch.relu(a - t),
            "silu": lambda: F.silu(a - t),
            "softplus": lambda: F.softplus(a - t),
            "sharp_softplus": lambda: F.softplus(a - t, beta=beta),
            "sigmoid": lambda: torch.sigmoid(beta * (a - t)),
            "binary": lambda: (a > t).to(a.dtype),
        }[self.process]()


class HeadMLP(nn.Module):
    """A two-layer network of its own for each head: x (B, H, L, inputs) -> (B, H, L, outputs); RMSNorm and SiLU between."""

    def __init__(self, heads: int, inputs: int, hidden: int, outputs: int, dropout: float = 0.0):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(heads, a, b) / a**0.5) for a, b in ((inputs, hidden), (hidden, outputs)))
        self.norm, self.dropout = nn.RMSNorm(hidden, eps=1e-6), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.dropout(x @ self.up))) @ self.down


@register("gin-attention", kind="module")
class GINAttention(nn.Module):
    """x (B, L, dim) -> (B, L, dim), causal. The values are the layer's own input, a slice a head. eps is learned, from 0; paper: 1 + eps
    in its place. project: W_o behind. mlp: replaces the heads' networks (a module on (B, H, L, D)). options: those of Adjacency."""

    def __init__(self, dim: int, heads: int, *, paper: bool = False, project: bool = True, mlp: nn.Module | None = None, **options: object):
        super().__init__()
        self.dim = dim
        self.adjacency = Adjacency(dim, heads, **options)  # type: ignore[arg-type]
        width = dim // heads
        self.heads, self.paper, self.eps = heads, paper, nn.Parameter(torch.zeros(()))
        self.mlp = HeadMLP(heads, width, 2 * width, width) if mlp is None else mlp
        self.out = nn.Linear(dim, dim, bias=False) if project else nn.Identity()

    @takes(x="batch length dim")
    def forward(self, x: Tensor) -> Tensor:
        own = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        y = self.mlp((self.eps + (1 if self.paper else 0)) * own + self.adjacency(x) @ own)
        return self.out(y.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


def aggregated(a: Tensor, v: Tensor) -> Tensor:
    """[sum, mean, max, variance] of v (..., L, D) with weights a (..., L, L): mean and variance over row sums, max over j with a_ij > 0
    (0 where there is none)."""
    total = a @ v
    degree = a.sum(-1, keepdim=True)
    degree = torch.where(degree == 0, 1.0, degree)
    mean = total / degree
    rows = [torch.where(a[..., i, :, None] > 0, v, float("-inf")).amax(-2) for i in range(a.shape[-2])]
    largest = torch.stack(rows, -2)
    largest = torch.where(largest.isfinite(), largest, 0.0)
    return torch.cat((total, mean, largest, (a @ v.square() / degree - mean.square()).clamp_min(0)), -1)


class PNAAttention(nn.Module):
    """x (B, L, dim) -> (B, L, dim), causal: four aggregations of W_v x, a network a head, W_o."""

    def __init__(self, dim: int, heads: int, **options: object):
        super().__init__()
        self.adjacency, self.heads = Adjacency(dim, heads, **options), heads  # type: ignore[arg-type]
        width = dim // heads
        self.v, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = HeadMLP(heads, 4 * width, 2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        a = self.adjacency(x)
        a = torch.relu(a) if self.adjacency.kind == "raw" else a
        return self.out(self.mlp(aggregated(a, v)).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class SparseGINAdapter(nn.Module):
    """A trainable graph update behind a frozen layer: h (B, L, dim), attention maps (B, H, L, L) -> (B, L, dim).

    G = clamp(sum_h A^h, max=1) (or their mean), sigmoid(kappa (G - threshold)) where kappa is given, entries below `floor` 0, lower triangle;
    h <- h + scale RMSNorm(eps h + G h), then a residual two-layer network behind the same scale. scale starts at 0: nothing changes.
    """

    def __init__(
        self,
        dim: int,
        *,
        mean: bool = False,
        kappa: float | None = None,
        threshold: float = 0.2,
        floor: float = 1e-3,
        self_loops: bool = True,
        scale: float = 0.0,
    ):
        super().__init__()
        self.mean, self.kappa, self.threshold, self.floor, self.self_loops = mean, kappa, threshold, floor, self_loops
        self.eps, self.scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.tensor(scale))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def graph(self, maps: Tensor) -> Tensor:
        """(B, L, L) edges, read off the maps without gradient into the layer that made them."""
        maps = maps.detach()
        g = maps.mean(1) if self.mean else maps.sum(1).clamp(max=1)
        g = g if self.kappa is None else torch.sigmoid(self.kappa * (g - self.threshold))
        return torch.where(g < self.floor, 0.0, g).tril(0 if self.self_loops else -1)

    def forward(self, h: Tensor, maps: Tensor) -> Tensor:
        return self.close(h, self.graph(maps) @ h)

    def sparse(self, h: Tensor, maps: Tensor) -> Tensor:
        """The same over a list of edges: cost grows with their number."""
        batch, to, source = self.graph(maps).nonzero(as_tuple=True)
        flat, length = h.flatten(0, 1), h.shape[1]
        weight = self.graph(maps)[batch, to, source][:, None]
        return self.close(h, torch.zeros_like(flat).index_add(0, batch * length + to, weight * flat[batch * length + source]).view_as(h))

    def close(self, h: Tensor, gathered: Tensor) -> Tensor:
        h = h + self.scale * self.norm(self.eps * h + gathered)
        return h + self.scale * self.mlp(h)  # type: ignore[no-any-return]


class GraphAdapted(nn.Module):
    """A pretrained decoder, frozen, with a `SparseGINAdapter` behind each block, which reads that block's own attention maps: called as the model is.

    layers: which (None: all). options: of the adapters. With their scales at 0, as they start, outputs are the model's. The maps of adapted layers are
    held, (B, H, L, L), and tokens must come whole: no cache (`use_cache=False` of a transformers model).
    """

    def __init__(self, model: nn.Module, dim: int, *, layers: Iterable[int] | None = None, **options: Any):
        super().__init__()
        count = len(sites(model))
        chosen = list(range(count) if layers is None else layers)
        if not chosen or not all(0 <= at < count for at in chosen):
            raise RegardError(f"layers={chosen}; expected some of 0 .. {count - 1}")
        self.model = model.requires_grad_(False)
        self.adapters = nn.ModuleDict({str(at): SparseGINAdapter(dim, **options) for at in chosen})
        self.adapters.to(next(model.parameters()))

    def forward(self, *args: Any, **given: Any) -> Any:
        layers = [int(at) for at in self.adapters]
        with read(self.model, "weights", layers=layers) as seen:

            def adapted(h: Tensor, at: At) -> Tensor:
                maps = seen["weights", at.layer]
                if maps.shape[-1] != maps.shape[-2]:
                    raise RegardError(f"maps of layer {at.layer} are {tuple(maps.shape[-2:])}; expected whole texts: use_cache=False")
                return self.adapters[str(at.layer)](h, maps.to(h.dtype))  # type: ignore[no-any-return]

            with edit(self.model, {"residual_out": adapted}, layers=layers):
                return self.model(*args, **given)
