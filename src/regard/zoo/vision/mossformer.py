"""MossFormer: exact attention inside chunks and linear attention over all, one head, three gates (id 158; Zhao and Ma, 2023).

F(x) = dropout(y + dwconv_17 y), y = silu(W norm(x));   x': the first half of x's channels one step late;   [v, u] = F(x'), z = F(x')
q, k of both kinds: gamma_i z + beta_i, 32 channels rotated
V = relu(q k^T / P)^2 v inside chunks of P + q' (k'^T v) / T;  U likewise of u;   y = x + F((U v) sigmoid(V u))
causal: lower-triangular inside the chunk, and the sum over earlier chunks k'^T v / P; convolutions read the past (the public code's read both sides)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Rope
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.parts import one_by_one, takes

NORMS = ("scalenorm", "layernorm")


class ScaleNorm(nn.Module):
    """x / max(|x| / sqrt(dim), eps) times one learned number, over the last dimension."""

    def __init__(self, eps: float = 1e-5):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * wide.square().mean(-1, keepdim=True).clamp_min(self.eps**2).rsqrt()).to(x.dtype) * self.weight


class ConvModule(nn.Module):
    """x (B, T, inner) -> (B, T, dim): y + dwconv y, y = silu(W norm(x)), dropout. past: in causal use, the kernel - 1 y before these."""

    def __init__(self, inner: int, dim: int, kernel: int = 17, norm: str = "scalenorm", dropout: float = 0.1, causal: bool = False):
        super().__init__()
        if norm not in NORMS or kernel % 2 == 0:
            raise RegardError(f"norm={norm!r}, kernel={kernel}; expected one of {', '.join(map(repr, NORMS))} and an odd kernel")
        self.norm: nn.Module = ScaleNorm() if norm == "scalenorm" else nn.LayerNorm(inner)
        self.linear, self.conv = nn.Linear(inner, dim), nn.Conv1d(dim, dim, kernel, groups=dim, bias=False)
        self.drop, self.ends = nn.Dropout(dropout), (kernel - 1, 0) if causal else (kernel // 2, kernel // 2)

    def with_past(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = F.silu(self.linear(self.norm(x)))
        wide = F.pad(y, (0, 0, *self.ends)) if past is None else torch.cat((past, y), 1)
        near = self.conv(wide.mT).mT if y.shape[1] else y
        return self.drop(y + near), wide[:, wide.shape[1] - sum(self.ends) :]

    def forward(self, x: Tensor) -> Tensor:
        return self.with_past(x)[0]


def joint_attention(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    values: Tensor,
    group: int = 256,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """relu(q k^T / P)^2 v inside chunks of P = group tokens plus q' (k'^T v) / T: all (B, T, d), values (B, T, e) -> (B, T, e).

    causal: the chunk's lower triangle, and k'^T v / P of the chunks before. The last chunk is filled up with zeros. dropout: of the chunk's weights.
    """
    length = values.shape[1]
    parts = [F.pad(x, (0, 0, 0, -length % group)).unflatten(1, (-1, group)) for x in (quad_q, quad_k, lin_q, lin_k, values)]
    quad_q, quad_k, lin_q, lin_k, v = parts  # (B, chunks, P, d)
    weights = F.dropout((quad_q @ quad_k.mT / group).relu().square(), dropout)
    near = (weights.tril() if causal else weights) @ v
    written = lin_k.mT @ v  # (B, chunks, d, e)
    if causal:
        state = F.pad(written / group, (0, 0, 0, 0, 1, 0)).cumsum(1)[:, :-1]
    else:
        state = written.sum(1, keepdim=True) / max(length, 1)
    return (near + lin_q @ state).flatten(1, 2)[:, :length]


@dataclass(frozen=True)
class JointState:
    """Of a stream: tokens seen; x and the convolutions' inputs still to be read; the running chunk's keys and values; what earlier ones wrote."""

    position: int
    last: Tensor
    pasts: tuple[Tensor, ...]
    chunk: tuple[Tensor, ...]
    written: Tensor


@register("mossformer", kind="module")
class JointGatedAttention(nn.Module):
    """x (B, T, dim) -> the same shape; `y, state = layer.step(x, state)` where causal. expansion: the width of [v, u] over dim."""

    def __init__(
        self,
        dim: int,
        group: int = 256,
        qk_dim: int = 128,
        causal: bool = False,
        expansion: float = 4.0,
        norm: str = "scalenorm",
        dropout: float = 0.1,
        shift: bool = True,
        kernel: int = 17,
        rotary: int = 32,
    ):
        super().__init__()
        hidden = int(dim * expansion)
        if group < 1 or hidden % 2 or qk_dim % 2 or rotary % 2 or (shift and dim < 2):
            raise RegardError(
                f"group={group}, dim x expansion={hidden}, qk_dim={qk_dim}, rotary={rotary}; expected a positive and even numbers, and two channels to shift one"
            )
        self.dim, self.group, self.causal, self.shift, self.dropout = dim, group, causal, shift, dropout
        self.hidden, self.qk = (ConvModule(dim, out, kernel, norm, dropout, causal) for out in (hidden, qk_dim))
        self.out = ConvModule(hidden // 2, dim, kernel, norm, dropout, causal)
        self.gamma, self.beta = nn.Parameter(0.02 * torch.randn(4, qk_dim)), nn.Parameter(torch.zeros(4, qk_dim))
        self.turn = Rope(dims=min(rotary, qk_dim), interleaved=True) if rotary else None

    def views(self, z: Tensor, first: int = 0) -> tuple[Tensor, ...]:
        """Quadratic and linear queries, quadratic and linear keys (B, T, qk_dim), in the order of gamma's rows."""
        found = (z[:, None] * self.gamma[:, None] + self.beta[:, None]).unbind(1)
        places = torch.arange(first, first + z.shape[1], device=z.device)
        return found if self.turn is None else tuple(self.turn.rotate(x, places) for x in found)

    def shifted(self, x: Tensor, last: Tensor | None = None) -> Tensor:
        if not self.shift:
            return x
        late, now = x.chunk(2, -1)
        before = torch.zeros_like(late[:, :1]) if last is None else last
        return torch.cat((torch.cat((before, late), 1)[:, : x.shape[1]], now), -1)

    def gated(self, values: Tensor, found: Tensor) -> Tensor:
        (v, u), (all_v, all_u) = values.chunk(2, -1), found.chunk(2, -1)
        return (all_u * v) * torch.sigmoid(all_v * u)

    @takes(x="batch length dim")
    def forward(self, x: Tensor) -> Tensor:
        late = self.shifted(x)
        values, (quad_q, lin_q, quad_k, lin_k) = self.hidden(late), self.views(self.qk(late))
        dropout = self.dropout if self.training else 0.0
        found = joint_attention(quad_q, quad_k, lin_q, lin_k, values, self.group, self.causal, dropout)
        return x + self.out(self.gated(values, found))  # type: ignore[no-any-return]

    @one_by_one
    def step(self, x: Tensor, state: JointState | None = None) -> tuple[Tensor, JointState]:
        if not self.causal:
            raise RegardError("a step needs causal=True: without it every token reads those to come")
        at, pasts = (0, (None, None, None)) if state is None else (state.position, state.pasts)
        late = self.shifted(x, None if state is None else state.last)
        values, past_v = self.hidden.with_past(late, pasts[0])
        z, past_z = self.qk.with_past(late, pasts[1])
        quad_q, lin_q, *kept = (*self.views(z, at), values)
        chunk = tuple(kept) if state is None else tuple(torch.cat(pair, 1) for pair in zip(state.chunk, kept, strict=True))
        written = x.new_zeros(x.shape[0], z.shape[2], values.shape[2]) if state is None else state.written
        found = (quad_q @ chunk[0].mT / self.group).relu().square() @ chunk[2] + lin_q @ written
        out, past_o = self.out.with_past(self.gated(values, found), pasts[2])
        if chunk[0].shape[1] == self.group:
            written, chunk = written + chunk[1].mT @ chunk[2] / self.group, tuple(y[:, :0] for y in chunk)
        return x + out, JointState(at + 1, x.chunk(2, -1)[0], (past_v, past_z, past_o), chunk, written)


class MossFormerSeparator(nn.Module):
    """Mixtures (B, samples) -> their sources (B, sources, samples): a learned transform relu(conv x), masks of it, and the way back.

    Masks: GroupNorm, conv_1x1, + s sin and cos of places, blocks of `JointGatedAttention`, LayerNorm, GroupNorm, + what went in, PReLU, a part a source
    of a conv_1x1, tanh(conv_1x1) sigmoid(conv_1x1), conv_1x1, ReLU. options: of the blocks.
    """

    def __init__(
        self, sources: int = 2, encoded: int = 512, dim: int = 512, blocks: int = 24, kernel: int = 16, eps: float = 1e-8, **options: object
    ):
        super().__init__()
        if kernel % 2 or dim % 2:
            raise RegardError(
                f"kernel={kernel}, dim={dim}; expected even numbers: the stride is half the kernel, places are sines and cosines"
            )
        self.sources, self.kernel = sources, kernel
        self.encoder = nn.Conv1d(1, encoded, kernel, kernel // 2, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(1, encoded, eps), nn.GroupNorm(1, dim, eps)
        self.first, self.scale = nn.Conv1d(encoded, dim, 1, bias=False), nn.Parameter(torch.ones(1))
        self.blocks = nn.Sequential(*[JointGatedAttention(dim, **options) for _ in range(blocks)], nn.LayerNorm(dim, eps=1e-6))  # type: ignore[arg-type]
        self.act, self.split = nn.PReLU(), nn.Conv1d(dim, dim * sources, 1)
        self.value, self.gate, self.last = nn.Conv1d(dim, dim, 1), nn.Conv1d(dim, dim, 1), nn.Conv1d(dim, encoded, 1, bias=False)
        self.decoder = nn.ConvTranspose1d(encoded, 1, kernel, kernel // 2, bias=False)

    def places(self, x: Tensor) -> Tensor:
        """(dim, T): sines, then cosines, of t / 10000^(2c / dim)."""
        dim, length = x.shape[1:]
        rates = 10000.0 ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float64) / dim)
        angle = rates[:, None] * torch.arange(length, device=x.device)
        return self.scale * torch.cat((angle.sin(), angle.cos())).to(x.dtype)

    def masks(self, heard: Tensor) -> Tensor:
        """(B, encoded, T) -> (B, sources, encoded, T)."""
        x = self.first(self.norm1(heard))
        x = x + self.places(x)
        x = self.act(self.norm2(self.blocks(x.mT).mT) + x)
        x = self.split(x).unflatten(1, (self.sources, -1)).flatten(0, 1)
        x = self.last(torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x)))
        return x.relu().unflatten(0, (-1, self.sources))  # type: ignore[no-any-return]

    @takes(x="batch samples")
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < self.kernel:
            raise RegardError(f"x has {x.shape[1]} samples; expected at least {self.kernel}, the encoder's kernel")
        heard = self.encoder(x[:, None]).relu()
        out = self.decoder((heard[:, None] * self.masks(heard)).flatten(0, 1)).unflatten(0, (-1, self.sources))[:, :, 0]
        return F.pad(out, (0, x.shape[1] - out.shape[2]))  # type: ignore[no-any-return]
