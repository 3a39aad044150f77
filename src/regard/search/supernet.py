"""Weights of the largest architecture; smaller ones use their leading slices, and every kind of attention the same projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import get
from ..engine.door import attend
from ..errors import RegardError
from .space import Arch, Space


class SuperLayer(nn.Module):
    """Projections and MLP at full width: weights (out, in) of which a call takes the leading rows and columns."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        for name, shape in {"q": (dim, dim), "k": (dim, dim), "v": (dim, dim), "out": (dim, dim)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) * shape[1] ** -0.5))
        for name, shape in {"up": (hidden, dim), "gate": (hidden, dim), "down": (dim, hidden)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) * shape[1] ** -0.5))


class SuperNet(nn.Module):
    """tokens (B, L) -> (B, L, outputs) for any architecture of the space; not causal, mean-pooled where `pooled`.

    Attention of a kind with no mask; kinds whose description needs inputs of its own cannot be in the space.
    """

    def __init__(self, space: Space, vocab: int, outputs: int, length: int = 256):
        super().__init__()
        for name in space.attentions:
            needed = [item.name for item in get(name).declared if item.default is None]
            if needed:
                raise RegardError(f"{name!r} needs the inputs {', '.join(needed)}, which a super-net does not make")
        dim, hidden = max(space.dims), max(space.hiddens)
        self.space = space
        self.embed = nn.Parameter(torch.randn(vocab, dim))
        self.place = nn.Parameter(torch.randn(length, dim) * 0.1)
        self.layers = nn.ModuleList([SuperLayer(dim, hidden) for _ in range(max(space.depths))])
        self.norm, self.head = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.randn(outputs, dim) * dim**-0.5)

    def forward(self, tokens: Tensor, arch: Arch) -> Tensor:
        d = arch.dim
        x = self.embed[tokens][..., :d] + self.place[: tokens.shape[1], :d]
        for weights, one in zip(self.layers, arch.layers, strict=False):
            y = F.rms_norm(x, (d,), weights.norm1[:d])  # type: ignore[index]
            q, k, v = (F.linear(y, getattr(weights, n)[:d, :d]).unflatten(-1, (one.heads, -1)).transpose(1, 2) for n in ("q", "k", "v"))
            x = x + F.linear(attend(q, k, v, one.attention).transpose(1, 2).flatten(-2), weights.out[:d, :d])  # type: ignore[index]
            y = F.rms_norm(x, (d,), weights.norm2[:d])  # type: ignore[index]
            inner = F.silu(F.linear(y, weights.gate[: one.hidden, :d])) * F.linear(y, weights.up[: one.hidden, :d])  # type: ignore[index]
            x = x + F.linear(inner, weights.down[:d, : one.hidden])  # type: ignore[index]
        return F.linear(F.rms_norm(x, (d,), self.norm[:d]), self.head[:, :d])

    def standalone(self, arch: Arch) -> SuperNet:
        """A net of that architecture alone, with copies of the slices."""
        d = arch.dim
        hidden = max(one.hidden for one in arch.layers)
        names, heads = tuple({one.attention for one in arch.layers}), tuple({one.heads for one in arch.layers})
        own = SuperNet(Space(names, (len(arch.layers),), (d,), heads, (hidden,)), self.embed.shape[0], self.head.shape[0], len(self.place))
        own.to(self.embed.dtype)
        mine = self.state_dict()
        with torch.no_grad():
            for name, p in own.named_parameters():
                p.copy_(mine[name][tuple(slice(0, size) for size in p.shape)])
        return own
