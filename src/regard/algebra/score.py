"""Scores: how well a query fits a key, before position, mask and normalizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .part import Function, Input, Learned, Part, Sizes, call, described

TINY = 1.2e-38  # the least distance that is raised to a power: at 0 its slope would be no number


@described
class Score(Part):
    """Two steps: `prepare` works on q and k alone (cheap, differentiated by autograd), `pair` joins them.

    A score whose `pair` is the plain dot product (`dot` is True) runs on every fast kernel.
    """

    @property
    def raw(self) -> str:
        """What kernels compute of a pair before elementwise functions: "dot" (q.k), "distance" (|q - k|^2), or "" (neither will do)."""
        return "dot"

    @property
    def dot(self) -> bool:
        return self.raw == "dot"

    @property
    def placed(self) -> bool:
        """Whether `pair` reads the places i and j."""
        return False

    @property
    def scaled(self) -> bool:
        """Whether `scale` means something."""
        return isinstance(self, Dot)

    @property
    def parts_beyond_dot(self) -> bool:
        """Whether `prepare` does more than scale q."""
        return not isinstance(self, Dot) or self.row_scale is not None or self.unit or self.power != -0.5

    def prepare(self, q: Tensor, k: Tensor, scale: float, env: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return q * scale, k

    def pair(self, q: Tensor, k: Tensor, env: Mapping[str, Any]) -> Tensor:
        """q (n, g, Lq, D), k (n, 1 or g, Lk, D) -> scores (n, g, Lq, Lk); env["h"] is the heads' numbers, (n or 1, g, 1, 1)."""
        return q @ k.transpose(-1, -2)


@described
class Pairing(Score):
    """Base of scores that are no dot product of what `prepare` gives: `pair` runs a tile at a time, differentiated by autograd."""

    @property
    def raw(self) -> str:
        return ""

    def prepare(self, q: Tensor, k: Tensor, scale: float, env: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return q, k


@described
class Dot(Score):
    """s_ij = scale * r_i * q_i.k_j, where r_i = row_scale(n_i, ...) is 1 unless given (Scalable-Softmax uses log n_i).

    row_scale: a plain function of the visible count `n`, and by name of `head_dim` and of declared inputs. power: scale is
    D ** power unless given. unit: q and k are brought to length one first.
    """

    row_scale: Function | None = None
    inputs: tuple[Input, ...] = ()
    power: float = -0.5
    unit: bool = False

    def prepare(self, q: Tensor, k: Tensor, scale: float, env: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        if self.unit:
            q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
        if self.row_scale is None:
            return q * scale, k
        return q * (scale * call(self.row_scale, env["n"], env=env)).to(q.dtype), k


def log2_pairs(sizes: Sizes) -> Tensor:
    """QKNorm's g0 = log2(L^2 - L), about the number of off-diagonal pairs (at least 1 for very short inputs)."""
    return torch.tensor(max(1.0, math.log2(max(2, sizes.k_len**2 - sizes.k_len))), dtype=torch.float64)


@described
class Cosine(Score):
    """s_ij = temperature_h * q_i.k_j / (|q_i| |k_j|); `scale` is not used. `temperature` is an input, one per head."""

    eps: float = 1e-6
    init: float | None = None

    @property
    def inputs(self) -> tuple[Input, ...]:
        start = log2_pairs if self.init is None else self.init
        return (Input("temperature", "h", default=start, layer=Learned(start)),)

    def prepare(self, q: Tensor, k: Tensor, scale: float, env: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        unit_q = torch.nn.functional.normalize(q, dim=-1, eps=self.eps)
        unit_k = torch.nn.functional.normalize(k, dim=-1, eps=self.eps)
        return unit_q * env["temperature"].to(q.dtype), unit_k


@described
class Distance(Pairing):
    """A falling function of |q_i - k_j|^power; `scale` is not used.

    link: "negative" -d | "gaussian" -d/2 | "log" -log(eps + d) (inverse-distance weights under softmax) | "inverse" 1/(eps + d).
    """

    power: float = 2.0
    link: str = "negative"
    eps: float = 1e-3

    def pair(self, q: Tensor, k: Tensor, env: Mapping[str, Any]) -> Tensor:
        # |q|^2 + |k|^2 - 2 q.k cancels where q is close to k, exactly where inverse distances matter: form differences
        # one channel at a time, which costs time but no (Lq, Lk, D) tensor.
        return self.linked(SquaredDistance.apply(q, k))

    @property
    def raw(self) -> str:
        return "distance"

    def linked(self, squared: Tensor) -> Tensor:
        """The score as a function of |q_i - k_j|^2."""
        d = squared if self.power == 2 else squared.clamp_min(TINY) ** (self.power / 2)
        if self.link == "negative":
            return -d
        if self.link == "gaussian":
            return -d / 2
        return -torch.log(self.eps + d) if self.link == "log" else 1 / (self.eps + d)


class SquaredDistance(torch.autograd.Function):
    """|q_i - k_j|^2 without cancellation; backward needs only matrix products."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(q, k)
        lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
        distance = torch.cdist(q.expand(*lead, *q.shape[-2:]), k.expand(*lead, *k.shape[-2:]), compute_mode="donot_use_mm_for_euclid_dist")
        return distance.square_()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        q, k = ctx.saved_tensors
        dq = 2 * (q * grad.sum(-1, keepdim=True) - grad @ k)
        dk = 2 * (k * grad.sum(-2).unsqueeze(-1) - grad.transpose(-1, -2) @ q)
        return dq.sum_to_size(q.shape), dk.sum_to_size(k.shape)


def additive_init(sizes: Sizes) -> Tensor:
    return torch.randn(sizes.heads, sizes.head_dim) / math.sqrt(sizes.head_dim)


@described
class Additive(Pairing):
    """Bahdanau's s_ij = u_h . tanh(q_i + k_j); input `direction` u (H, D)."""

    inputs: tuple[Input, ...] = (Input("direction", "hd", layer=Learned(additive_init)),)

    def pair(self, q: Tensor, k: Tensor, env: Mapping[str, Any]) -> Tensor:
        u = env["direction"].to(q.dtype)[env["h"]]
        return (torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3)) * u).sum(-1)


@described
class Pairwise(Pairing):
    """A user's own score: `function(q, k) -> (..., Lq, Lk)`, any plain function of tensors; `scale` is not used."""

    function: Function = torch.matmul

    def pair(self, q: Tensor, k: Tensor, env: Mapping[str, Any]) -> Tensor:
        return call(self.function, q, k, env=env)
