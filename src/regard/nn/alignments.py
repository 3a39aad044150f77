"""Alignment functions: how well a key answers a query, the twelve of Chaudhari et al. (2019). q (B, Tq, D), k (B, Tk, D) -> e (B, Tq, Tk)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RegardError

Map = Callable[[Tensor], Tensor]


def shifted_elu(x: Tensor) -> Tensor:
    """elu(x) + 1, which is positive."""
    return F.elu(x) + 1


def from_mean(k: Tensor) -> Tensor:
    """Each key less the mean of all (B, Tk, D)."""
    return k - k.mean(1, keepdim=True)


class Similarity(nn.Module):
    """q.k, with `cosine` over |q| |k|, with `scaled` over sqrt(D), of features phi(q).phi(k) where phi is given."""

    def __init__(self, dim: int, cosine: bool = False, scaled: bool = False, phi: Map | None = None):
        super().__init__()
        self.cosine, self.scale, self.phi = cosine, dim**-0.5 if scaled else 1.0, phi

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        if self.cosine:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if self.phi is not None:
            q, k = self.phi(q), self.phi(k)
        return self.scale * q @ k.mT


class Bilinear(nn.Module):
    """q^T W k; with `bias` k^T (W q + b); with `act` act(q^T W k + b), b a number."""

    def __init__(self, dim: int, bias: bool = False, act: Map | None = None):
        super().__init__()
        self.w, self.act = nn.Linear(dim, dim, bias=bias), act
        self.b = nn.Parameter(torch.zeros(())) if act is not None else None

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        e = self.w(q) @ k.mT
        return e if self.act is None else self.act(e + self.b)


class Net(nn.Module):
    """w^T act(W_q q + W_k k + b), the concatenated form W [q; k] being the same; layers above 1: act(W_l E + b_l) between."""

    def __init__(self, dim: int, hidden: int | None = None, layers: int = 1, act: Map = torch.tanh):
        super().__init__()
        hidden = dim if hidden is None else hidden
        self.q, self.k, self.act = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden), act
        self.deeper = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.w = nn.Linear(hidden, 1, bias=False)

    def hidden(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, Tq, Tk, hidden)."""
        e = self.act(self.q(q)[:, :, None] + self.k(k)[:, None])
        for layer in self.deeper:
            e = self.act(layer(e))
        return e

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.w(self.hidden(q, k))[..., 0]  # type: ignore[no-any-return]


class Joined(nn.Module):
    """w^T act(W [q; k] + b), one matrix."""

    def __init__(self, dim: int, hidden: int | None = None, act: Map = torch.tanh):
        super().__init__()
        hidden = dim if hidden is None else hidden
        self.both, self.w, self.act = nn.Linear(2 * dim, hidden), nn.Linear(hidden, 1, bias=False), act

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        shape = q.shape[0], q.shape[1], k.shape[1], q.shape[2]
        pairs = torch.cat((q[:, :, None].expand(shape), k[:, None].expand(shape)), -1)
        return self.w(self.act(self.both(pairs)))[..., 0]  # type: ignore[no-any-return]


class Location(nn.Module):
    """act(W q), an entry a place: keys do not count. length: the most keys."""

    def __init__(self, dim: int, length: int = 64, act: Map = torch.tanh):
        super().__init__()
        self.w, self.act = nn.Linear(dim, length, bias=False), act

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        if k.shape[1] > self.w.out_features:
            raise RegardError(f"{k.shape[1]} keys: expected at most length={self.w.out_features}")
        return self.act(self.w(q))[..., : k.shape[1]]


class Featured(nn.Module):
    """w^T act(W_1 phi_1(K) + W_2 phi_2(K) + b): queries do not count. phi_1, phi_2: maps of all keys (B, Tk, D)."""

    def __init__(self, dim: int, hidden: int | None = None, first: Map | None = None, second: Map = from_mean, act: Map = torch.tanh):
        super().__init__()
        hidden = dim if hidden is None else hidden
        self.one, self.two, self.act = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden), act
        self.first, self.second, self.w = first, second, nn.Linear(hidden, 1, bias=False)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        features = self.one(k if self.first is None else self.first(k)) + self.two(self.second(k))
        return self.w(self.act(features))[..., 0][:, None].expand(-1, q.shape[1], -1)  # type: ignore[no-any-return]


ALIGNMENTS: dict[str, Callable[..., nn.Module]] = {
    "similarity": lambda dim, **how: Similarity(dim, cosine=True, **how),
    "dot": lambda dim, **how: Similarity(dim, **how),
    "scaled": lambda dim, **how: Similarity(dim, scaled=True, **how),
    "general": lambda dim, **how: Bilinear(dim, **how),
    "biased general": lambda dim, **how: Bilinear(dim, bias=True, **how),
    "activated general": lambda dim, act=torch.tanh, **how: Bilinear(dim, act=act, **how),
    "generalized kernel": lambda dim, phi=shifted_elu, **how: Similarity(dim, phi=phi, **how),
    "concat": lambda dim, **how: Joined(dim, **how),
    "additive": lambda dim, **how: Net(dim, **how),
    "deep": lambda dim, layers=2, **how: Net(dim, layers=layers, **how),
    "location": lambda dim, **how: Location(dim, **how),
    "feature": lambda dim, **how: Featured(dim, **how),
}


def alignment(name: str, dim: int, **how: Any) -> nn.Module:
    """One of ALIGNMENTS by name; how: its options (hidden, act, layers, phi, length, first, second)."""
    if name not in ALIGNMENTS:
        raise RegardError(f"alignment={name!r}: expected one of {', '.join(ALIGNMENTS)}")
    try:
        return ALIGNMENTS[name](dim, **how)
    except TypeError as wrong:
        raise RegardError(f"alignment {name!r} does not take {', '.join(how)}: {wrong}") from wrong


__all__ = ["ALIGNMENTS", "Net", "alignment"]
