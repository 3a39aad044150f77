"""RADLADS: a softmax decoder becomes a linear one in three stages, its projections copied into simplified RWKV layers (id 99; Goldstein et al., 2025).

rad_rwkv6: x_* = x + dx (mu_* + tanh((x + dx mu_x) A_mix) B_*), dx_t = x_(t-1) - x_t, for q, k, v, w, g;  log w = -exp(lambda + tanh(x_w A) B)
           S_t = diag(w_t) S_(t-1) + (1 - w_t) k_t v_t^T,  o = q S_t / sqrt(d),  y = W_o (o sigmoid(tanh(x_g A) B)).  No rotary positions, no norm
rad_rwkv7: a = sigmoid(x A B + b), log w = -e^(-1/2) sigmoid(tanh(x A) B + lambda), kh = k / |k|, q and k with rotary positions
           S_t = (diag(w_t) - (a kh) kh^T) S_(t-1) + k (1 - w + a) v_t^T,  o = q S_t / sqrt(d),  y = W_o (o (sigmoid(x A) B)).  No token shift, no bonus
stages: distance of each layer's output, mean_t |y - y'| / sqrt(D);  KL of logits;  next tokens of longer texts
rad_rwkv6 follows the released layer, rad_rwkv7 the paper's appendix. Not built: the residual of the first layer's values between layers of rad_rwkv7.
Not reproduced with a toy teacher that copies: that distillation ends lower after alignment than alone, and that copied projections begin nearer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.adapt.conversion import Conversion, convert
from regard.adapt.stages import Distil, Lesson, Stage, Transfer, Tune, first
from regard.adapt.student import Rotary, Student
from regard.algebra import Causal, Recurrent
from regard.catalog.registry import register
from regard.engine.stream import ScanState, step
from regard.errors import RegardError

GATED = Recurrent(decay="channel", scaled=False)
GOOSE = Recurrent(decay="channel", write="dplr", scaled=False)
INNER = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "": lambda x: x}


class LowRank(nn.Module):
    """f(x A) B + bias: A starts at zero, B uniform in +-0.01 or, orthogonal, scaled by 0.1. bias: its first values (None: none)."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        inner: str,
        like: Tensor,
        generator: torch.Generator,
        bias: Tensor | None,
        orthogonal: bool = False,
    ):
        super().__init__()
        dim, rank, out = shape
        drawn = torch.empty(rank, out)
        if orthogonal:
            nn.init.orthogonal_(drawn, 0.1 * math.sqrt(max(1.0, rank / out)), generator=generator)
        else:
            drawn.uniform_(-0.01, 0.01, generator=generator)
        self.inner, self.a, self.b = inner, nn.Parameter(like.new_zeros(dim, rank)), nn.Parameter(drawn.to(like))
        self.bias = None if bias is None else nn.Parameter(bias.to(like))

    def forward(self, x: Tensor) -> Tensor:
        y = INNER[self.inner](x @ self.a) @ self.b
        return y if self.bias is None else y + self.bias


class Remembered(NamedTuple):
    """The last token's input (B, 1, dim) and the recurrence's state."""

    last: Tensor
    scan: ScanState


class RadAttention(Student):
    """What both students share: their projections a head, and the gated end. mixed(x, ...) gives q, k, v, what goes with them, and the gate."""

    mechanism: Recurrent

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self.dim, self.width = self.like.shape[1], self.heads * self.head_dim
        self.depth = self.layer_idx / max(1, self.config.num_hidden_layers - 1)

    @property
    def like(self) -> Any:
        """Of whose dtype and device new weights are."""
        return self.q_proj.weight  # type: ignore[union-attr]

    def in_heads(self, name: str, x: Tensor) -> Tensor:
        """A projection's output (B, H, L, d), normed where the model norms it, key heads several times over."""
        y = getattr(self, f"{name}_proj")(x).unflatten(-1, (-1, self.head_dim))
        y = getattr(self, f"{name}_norm")(y) if hasattr(self, f"{name}_norm") else y
        return y.transpose(1, 2).repeat_interleave(self.heads // y.shape[2], 1)  # type: ignore[no-any-return]

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def mixed(self, x: Tensor, last: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], Tensor]:
        raise NotImplementedError

    def run(self, x: Tensor, rotary: Rotary, keep: Tensor | None = None, state: Any = None) -> tuple[Tensor, Remembered]:
        x = x if keep is None else torch.where(keep[..., None], x, 0.0)
        last = torch.zeros_like(x[:, :1]) if state is None else state.last
        q, k, v, inputs, gate = self.mixed(x, last, rotary)
        k = k if keep is None else torch.where(keep[:, None, :, None], k, 0.0)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            given: Any = {name: y.to(wide) for name, y in inputs.items()}
            before = None if state is None else state.scan
            out, scan = step(q.to(wide) * self.scaling, k.to(wide), v.to(wide), self.mechanism, before, mask=Causal(), **given)
        y = self.o_proj(out.transpose(1, 2).flatten(2).to(v.dtype) * gate)  # type: ignore[operator]
        return y, Remembered(x[:, -1:], scan)  # type: ignore[arg-type]


class RadRWKV6(RadAttention):
    """rad_rwkv6; see `radlads_convert`."""

    mechanism = GATED

    def __init__(
        self,
        layer: nn.Module,
        generator: torch.Generator,
        mix_rank: int | None = None,
        decay_rank: int | None = None,
        gate_rank: int = 128,
        balance: bool = True,
        floor: float | None = None,
    ):
        super().__init__(layer)
        wide, like = self.dim >= 4096, self.like
        mix_rank, decay_rank = mix_rank or (64 if wide else 32), decay_rank or (128 if wide else 64)
        self.balance, self.floor = balance, floor
        self.mu_x, self.mu = nn.Parameter(like.new_ones(self.dim)), nn.Parameter(like.new_zeros(5, self.dim))
        self.mix_a = nn.Parameter(like.new_zeros(self.dim, 5 * mix_rank))
        self.mix_b = nn.Parameter(torch.empty(5, mix_rank, self.dim).uniform_(-0.01, 0.01, generator=generator).to(like))
        at = torch.arange(self.width) / max(1, self.width - 1)
        speed = -6 + 5 * at ** (0.7 + 1.3 * self.depth)
        self.decay = LowRank((self.dim, decay_rank, self.width), "tanh", like, generator, speed)
        self.gate = LowRank((self.dim, gate_rank, self.width), "tanh", like, generator, None)

    def shifted(self, x: Tensor, last: Tensor) -> Tensor:
        """x for q, k, v, w and g, (5, B, L, dim): between each token and the one before."""
        change = torch.cat((last, x[:, :-1]), 1) - x
        told = torch.tanh((x + change * self.mu_x) @ self.mix_a).unflatten(-1, (5, -1))
        return x + change * (self.mu[:, None, None] + torch.einsum("blmr,mrd->mbld", told, self.mix_b))  # type: ignore[no-any-return]

    def mixed(self, x: Tensor, last: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], Tensor]:
        for_q, for_k, for_v, for_w, for_g = self.shifted(x, last)
        q, k, v = (self.in_heads(name, y) for name, y in (("q", for_q), ("k", for_k), ("v", for_v)))
        log = self.split(-torch.exp(self.decay(for_w).float() if x.dtype != torch.float64 else self.decay(for_w)))
        log = log if self.floor is None else log.clamp_min(self.floor)
        k = -torch.expm1(log).to(k.dtype) * k if self.balance else k
        return q, k, v, {"log_decay": log}, torch.sigmoid(self.gate(for_g))


class RadRWKV7(RadAttention):
    """rad_rwkv7; see `radlads_convert`."""

    mechanism = GOOSE

    def __init__(
        self, layer: nn.Module, generator: torch.Generator, decay_rank: int | None = None, rate_rank: int = 64, gate_rank: int = 128
    ):
        super().__init__(layer)
        like, decay_rank = self.like, decay_rank or (128 if self.dim >= 4096 else 64)
        at = torch.arange(self.width) / max(1, self.width - 1)
        speed = -7 + 5 * at ** (0.85 + self.depth**0.5) + 0.5
        self.decay = LowRank((self.dim, decay_rank, self.width), "tanh", like, generator, speed)
        self.rate = LowRank((self.dim, rate_rank, self.width), "", like, generator, torch.zeros(self.width))
        self.gate = LowRank((self.dim, gate_rank, self.width), "sigmoid", like, generator, None, orthogonal=True)

    def mixed(self, x: Tensor, last: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], Tensor]:
        q, k = self.turn(self.in_heads("q", x), self.in_heads("k", x), *rotary)
        rate = self.split(torch.sigmoid(self.rate(x)))
        log = -math.exp(-0.5) * torch.sigmoid(self.split(self.decay(x)))
        unit = F.normalize(k, dim=-1, eps=1e-12)
        inputs = {"log_decay": log, "erase": -unit, "insert": unit * rate}
        return q, k * (rate - torch.expm1(log)), self.in_heads("v", x), inputs, self.gate(x)


KINDS: dict[str, Any] = {"rad_rwkv6": RadRWKV6, "rad_rwkv7": RadRWKV7}


@register("radlads", kind="function")
def radlads_convert(model: nn.Module, student: str = "rad_rwkv6", layers: Any = None, seed: int = 0, **options: Any) -> Conversion:
    """Every attention layer of a transformers decoder (or those numbered in `layers`) as a RADLADS student with copies of its q, k, v and o, whose
    state does not grow with the text. seed: of what else is drawn.

    options: mix_rank, decay_rank, gate_rank, and of rad_rwkv6 balance (keys times 1 - w) and floor (of log w), of rad_rwkv7 rate_rank. Then
    `carry_out(conversion, radlads_stages(...), draw)`.
    """
    if student not in KINDS:
        raise RegardError(f"student={student!r}: expected one of {', '.join(KINDS)}")
    ranks = [value for name, value in options.items() if name.endswith("_rank") and value is not None]
    if any(value < 1 for value in ranks):
        raise RegardError(f"ranks {ranks}: expected 1 or more")
    generator = torch.Generator().manual_seed(seed)
    return convert(model, lambda layer: KINDS[student](layer, generator, **options), layers=layers)


def output_distance(student: Any, lesson: Lesson) -> Tensor:
    """mean_t |y_t - y'_t| / sqrt(D) of a layer's outputs (B, L, D)."""
    args, kwargs, out = lesson
    truth = first(out)
    return torch.linalg.vector_norm(first(student(*args, **kwargs)) - truth, dim=-1).mean() * truth.shape[-1] ** -0.5


def radlads_stages(align: int, distil: int, tune: int = 0, lr: float = 1e-3, final_lr: float = 1e-5, **options: Any) -> list[Stage]:
    """Steps of the three stages: each layer's alignment from lr to final_lr on half a cosine; logits at final_lr; next tokens at final_lr, in the
    paper on texts of 16k tokens. Stages of no steps are left out. options: of every `Stage`, Adam's betas being 0.9 and 0.95 as in the paper."""
    given: dict[str, Any] = {"betas": (0.9, 0.95), **options}
    stages: list[Stage] = [
        Transfer(align, lr, loss=output_distance, schedule="cosine", final_lr=final_lr, **given),
        Distil(distil, final_lr, **given),
        Tune(tune, final_lr, **given),
    ]
    return [stage for stage in stages if stage.steps]
