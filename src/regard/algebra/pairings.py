"""Scores by small networks, phases and learned relative positions: more than a dot product of two vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError
from .part import Input, Learned, Sizes, bind, described
from .score import Pairing


def network_init(sizes: Sizes, rows: int, columns: int) -> Tensor:
    """Uniform in +-1/sqrt(columns), as a linear layer starts; `columns` 0 is head_dim."""
    columns = columns or sizes.head_dim
    shape = (rows, columns) if rows else (columns,)
    return torch.empty(shape).uniform_(-1, 1) / math.sqrt(columns)


@described
class Network(Pairing):
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
class Relative(Pairing):
    """s_ij = D^-1/2 ((q_i + u_h).k_j + q_i.E_(i-j),h + b_(i-j),h): content and position of Transformer-XL, with learned tables.

    Inputs `content` u (H, D), `table` E (2 reach, H, D) and `apart` b (2 reach, H), all from 0; row i - j + reach is offset i - j, which
    must lie in [-reach, reach).
    """

    reach: int = 4096

    @property
    def inputs(self) -> tuple[Input, ...]:
        table, offset = (bind(far, reach=self.reach, channels=channels) for channels in (True, False))
        return (
            Input("content", "hd", layer=Learned(0.0)),
            Input("table", "fhd", layer=Learned(table)),
            Input("apart", "fh", layer=Learned(offset)),
        )

    @property
    def placed(self) -> bool:
        return True

    def pair(self, q: Tensor, k: Tensor, env: Mapping[str, Any]) -> Tensor:
        heads, apart = env["h"][..., 0, 0], env["i"] - env["j"]
        low, high = int(apart.min()), int(apart.max())
        if low < -self.reach or high >= self.reach:
            raise RegardError(f"offsets {low}..{high} lie outside the table's [-{self.reach}, {self.reach}); expected a larger reach")
        near = slice(low + self.reach, high + self.reach + 1)
        content = (q + env["content"].to(q.dtype)[heads].unsqueeze(-2)) @ k.transpose(-1, -2)
        table = env["table"].to(q.dtype)[near][:, heads].movedim(0, -1)  # (..., g, D, offsets)
        position = q @ table + env["apart"].to(q.dtype)[near][:, heads].movedim(0, -1).unsqueeze(-2)
        place = (apart - low).expand(content.shape)
        return q.shape[-1] ** -0.5 * (content + position.expand(*content.shape[:-1], -1).gather(-1, place))


def zeros(sizes: Sizes, size: int) -> Tensor:
    return torch.zeros(size)


@described
class Phase(Pairing):
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
