"""Scores: how well a query fits a key, before position, mask and normalizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError
from .part import Function, Input, Learned, Part, Sizes, bind, call, described


@described
class Score(Part):
    """Two steps: `prepare` works on q and k alone (cheap, differentiated by autograd), `pair` joins them.

    A score whose `pair` is the plain dot product (`dot` is True) runs on every fast kernel.
    """

    @property
    def dot(self) -> bool:
        return True

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
    return torch.tensor(max(1.0, math.log2(max(2, sizes.k_len**2 - sizes.k_len))))


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
class Distance(Score):
    """A falling function of |q_i - k_j|^power; `scale` is not used.

    link: "negative" -d | "gaussian" -d/2 | "log" -log(eps + d) (inverse-distance weights under softmax) | "inverse" 1/(eps + d).
    """

    power: float = 2.0
    link: str = "negative"
    eps: float = 1e-3

    @property
    def dot(self) -> bool:
        return False

    def prepare(self, q: Tensor, k: Tensor, scale: float, env: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return q, k

    def pair(self, q: Tensor, k: Tensor, env: Mapping[str, Any]) -> Tensor:
        # |q|^2 + |k|^2 - 2 q.k cancels where q is close to k, exactly where inverse distances matter: form differences
        # one channel at a time, which costs time but no (Lq, Lk, D) tensor.
        squared = SquaredDistance.apply(q, k)
        d = squared if self.power == 2 else squared.clamp_min(torch.finfo(squared.dtype).tiny) ** (self.power / 2)
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
class Additive(Score):
    """Bahdanau's s_ij = u_h . tanh(q_i + k_j); input `direction` u (H, D)."""

    inputs: tuple[Input, ...] = (Input("direction", "hd", layer=Learned(additive_init)),)

    @property
    def dot(self) -> bool:
        return False

    def prepare(self, q: Tensor, k: Tensor, scale: float, env: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return q, k

    def pair(self, q: Tensor, k: Tensor, env: Mapping[str, Any]) -> Tensor:
        u = env["direction"].to(q.dtype)[env["h"]]
        return (torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3)) * u).sum(-1)


@described
class Pairwise(Score):
    """A user's own score: `function(q, k) -> (..., Lq, Lk)`, any plain function of tensors; `scale` is not used."""

    function: Function = torch.matmul

    @property
    def dot(self) -> bool:
        return False

    def prepare(self, q: Tensor, k: Tensor, scale: float, env: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return q, k

    def pair(self, q: Tensor, k: Tensor, env: Mapping[str, Any]) -> Tensor:
        return call(self.function, q, k, env=env)


def network_init(sizes: Sizes, rows: int, columns: int) -> Tensor:
    """Uniform in +-1/sqrt(columns), as a linear layer starts; `columns` 0 is head_dim."""
    columns = columns or sizes.head_dim
    shape = (rows, columns) if rows else (columns,)
    return torch.empty(shape).uniform_(-1, 1) / math.sqrt(columns)


@described
class Network(Score):
    """s_ij = w_3 . relu(W_2 relu(W_1 [A q_i + a; B k_j + b] + b_1) + b_2) + b_3: a small network over each pair; `scale` is not used.

    width: channels D' of the projections A q and B k, shared by all heads; W_2 has D' / 2 rows. The first layer is applied to queries and
    keys alone, so that a pair costs D'^2 / 2 multiplications. Inputs `q_down` A, `q_bias`, `k_down` B, `k_bias`, `w1` (D', 2 D'), `b1`,
    `w2` (D' / 2, D'), `b2`, `w3` (D' / 2,), `b3`.
    """

    width: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 2:
            raise RegardError(f"Network(width={self.width}): expected at least 2")

    @property
    def inputs(self) -> tuple[Input, ...]:
        d, half = self.width, self.width // 2

        def made(name: str, shape: str, rows: int, columns: int) -> Input:
            start = bind(network_init, rows=rows, columns=columns)
            return Input(name, shape, layer=Learned(start))

        zero = [
            Input(name, "f", layer=Learned(bind(zeros, size=size)))
            for name, size in (("q_bias", d), ("k_bias", d), ("b1", d), ("b2", half))
        ]
        return (
            made("q_down", "fd", d, 0),
            made("k_down", "fd", d, 0),
            made("w1", "ff", d, 2 * d),
            made("w2", "ff", half, d),
            made("w3", "f", 0, half),
            *zero,
            Input("b3", layer=Learned(0.0)),
        )

    @property
    def dot(self) -> bool:
        return False

    def prepare(self, q: Tensor, k: Tensor, scale: float, env: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        w = {item.name: env[item.name].to(q.dtype) for item in self.inputs}
        first_q, first_k = w["w1"].chunk(2, 1)
        low_q, low_k = q @ w["q_down"].T + w["q_bias"], k @ w["k_down"].T + w["k_bias"]
        return low_q @ first_q.T + w["b1"], low_k @ first_k.T

    def pair(self, q: Tensor, k: Tensor, env: Mapping[str, Any]) -> Tensor:
        hidden = torch.relu(q.unsqueeze(-2) + k.unsqueeze(-3))
        hidden = torch.relu(hidden @ env["w2"].to(q.dtype).T + env["b2"].to(q.dtype))
        return hidden @ env["w3"].to(q.dtype) + env["b3"].reshape(()).to(q.dtype)


def far(sizes: Sizes, reach: int, channels: bool) -> Tensor:
    return torch.zeros(2 * reach, sizes.heads, sizes.head_dim) if channels else torch.zeros(2 * reach, sizes.heads)


@described
class Relative(Score):
    """s_ij = D^-1/2 ((q_i + u_h).k_j + q_i.E_(i-j),h + b_(i-j),h): content and position of Transformer-XL, with learned tables.

    Inputs `content` u (H, D), `table` E (2 reach, H, D) and `offset` b (2 reach, H), all from 0; row i - j + reach is offset i - j, which
    must lie in [-reach, reach).
    """

    reach: int = 4096

    @property
    def inputs(self) -> tuple[Input, ...]:
        table, offset = (bind(far, reach=self.reach, channels=channels) for channels in (True, False))
        return (
            Input("content", "hd", layer=Learned(0.0)),
            Input("table", "fhd", layer=Learned(table)),
            Input("offset", "fh", layer=Learned(offset)),
        )

    @property
    def dot(self) -> bool:
        return False

    @property
    def placed(self) -> bool:
        return True

    def prepare(self, q: Tensor, k: Tensor, scale: float, env: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return q, k

    def pair(self, q: Tensor, k: Tensor, env: Mapping[str, Any]) -> Tensor:
        heads, apart = env["h"][..., 0, 0], env["i"] - env["j"]
        low, high = int(apart.min()), int(apart.max())
        if low < -self.reach or high >= self.reach:
            raise RegardError(f"offsets {low}..{high} lie outside the table's [-{self.reach}, {self.reach}); expected a larger reach")
        near = slice(low + self.reach, high + self.reach + 1)
        content = (q + env["content"].to(q.dtype)[heads].unsqueeze(-2)) @ k.transpose(-1, -2)
        table = env["table"].to(q.dtype)[near][:, heads].movedim(0, -1)  # (..., g, D, offsets)
        position = q @ table + env["offset"].to(q.dtype)[near][:, heads].movedim(0, -1).unsqueeze(-2)
        place = (apart - low).expand(content.shape)
        return q.shape[-1] ** -0.5 * (content + position.expand(*content.shape[:-1], -1).gather(-1, place))


def zeros(sizes: Sizes, size: int) -> Tensor:
    return torch.zeros(size)


@described
class Phase(Score):
    """s_ij = (qA_i.kA_j) / sqrt(theta D) * cos(2 pi |i - j|^alpha phi_ij), where A are the first theta D channels and P the others.

    phase: "quadratic": phi = qP_i.kP_j / sqrt(D - theta D); "linear": (sum qP_i + sum kP_j) / sqrt(D - theta D). `scale` is not used.
    """

    alpha: float = 0.1
    theta: float = 0.5
    phase: str = "quadratic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.phase not in ("quadratic", "linear") or not 0 < self.theta < 1:
            raise RegardError(f"Phase(phase={self.phase!r}, theta={self.theta}): expected quadratic or linear, and 0 < theta < 1")

    @property
    def dot(self) -> bool:
        return False

    @property
    def placed(self) -> bool:
        return True

    def prepare(self, q: Tensor, k: Tensor, scale: float, env: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        d, own = q.shape[-1], self.own(q.shape[-1])
        q_phase, k_phase = q[..., own:], k[..., own:]
        if self.phase == "linear":
            q_phase, k_phase = q_phase.sum(-1, keepdim=True), k_phase.sum(-1, keepdim=True)
            q_phase, k_phase = torch.cat((q_phase, torch.ones_like(q_phase)), -1), torch.cat((torch.ones_like(k_phase), k_phase), -1)
        return torch.cat((q[..., :own] * own**-0.5, q_phase * (d - own) ** -0.5), -1), torch.cat((k[..., :own], k_phase), -1)

    def own(self, d: int) -> int:
        """How many of d channels make the amplitude."""
        if d < 2:
            raise RegardError(f"head_dim is {d}; a phase score needs at least 2 channels")
        return max(1, min(d - 1, round(self.theta * d)))

    def pair(self, q: Tensor, k: Tensor, env: Mapping[str, Any]) -> Tensor:
        cut = q.shape[-1] - 2 if self.phase == "linear" else self.own(q.shape[-1])
        amplitude = q[..., :cut] @ k[..., :cut].transpose(-1, -2)
        phase = q[..., cut:] @ k[..., cut:].transpose(-1, -2)
        distance = (env["i"] - env["j"]).abs().to(phase.dtype) ** self.alpha
        return amplitude * torch.cos(2 * math.pi * distance * phase)
