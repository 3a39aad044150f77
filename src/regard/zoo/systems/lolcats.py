"""LoLCATs: a pretrained model made linear, softmax over the last keys and learned feature maps for all older ones (id 64; Zhang et al., 2024).

y_i = (sum_W a_ij v_j + sum_U b_ij v_j) / (sum_W a_ij + sum_U b_ij),   W the last w keys, U those before
a_ij = g exp(q_i.k_j / sqrt(d) - m_i), m_i the largest in W;   b_ij = phi_q(q_i).phi_k(k_j), phi(x) = max([softmax(x W), softmax(-x W)], eps)
W a head, of queries and of keys;  g = sigmoid(gamma) a head;  `affine`: b times 1 - g.   Rotary positions come first
Not built: the "terraced" windows of the paper's kernels (which leave a query between w and 2w keys), and blocks of layers of models too big for one machine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.adapt.conversion import Conversion, convert
from regard.adapt.stages import Lesson, Lora, Transfer
from regard.adapt.student import Student, Tokens
from regard.algebra import Causal, Recurrent
from regard.algebra.feature_map import softmax_half, softmax_pair
from regard.catalog.registry import register
from regard.engine.stream import ScanState, step
from regard.errors import RegardError
from regard.nn.window_sums import window_sums

OLDER = Recurrent(scaled=False)  # sum_j phi_q.phi_k [v_j, 1]
FORMS = {"softmax": softmax_pair, "half": softmax_half}


class Remembered(NamedTuple):
    """The last w keys and values, which of them are there, and the sums of all older ones; `bytes` of it does not depend on the length."""

    k: Tensor
    v: Tensor
    there: Tensor
    older: ScanState | None


class LolcatsAttention(Student):
    """An attention layer's LoLCATs form; see `convert_lolcats`. stabilise: "reference", the released one, in which the window's weights are
    relative to their largest and the others are not; or "exact", without that shift: a_ij = g exp(q_i.k_j / sqrt(d))."""

    def __init__(
        self,
        layer: nn.Module,
        window: int = 64,
        feature_dim: int = 64,
        form: str = "softmax",
        eps: float = 1e-12,
        gamma: float = -2.1972245773362196,
        train_gamma: bool = True,
        affine: bool = False,
        tie: bool = False,
        stabilise: str = "reference",
        generator: torch.Generator | None = None,
    ):
        super().__init__(layer)
        if window < 1 or feature_dim < 1 or form not in FORMS or stabilise not in ("reference", "exact"):
            raise RegardError(
                f"window={window}, feature_dim={feature_dim}, form={form!r}, stabilise={stabilise!r}: expected at least 1, one of "
                f"{', '.join(FORMS)}, and 'reference' or 'exact'"
            )
        self.window, self.form, self.eps, self.affine, self.stabilise = window, form, eps, affine, stabilise
        bound = (6 / (self.head_dim * feature_dim)) ** 0.5  # Kaiming's, a fan in of (H, d, f) being counted as d f
        drawn = (2 * torch.rand(self.heads, self.head_dim, feature_dim, generator=generator) - 1) * bound
        self.query_map = nn.Parameter(drawn)
        self.key_map = self.query_map if tie else nn.Parameter(drawn.clone())
        factor = torch.full((1, self.heads, 1, 1), float(gamma))
        if train_gamma:
            self.gamma: Tensor = nn.Parameter(factor)
        else:
            self.register_buffer("gamma", factor)

    def features(self, x: Tensor, weight: Tensor) -> Tensor:
        """phi of x (B, H, L, d)."""
        return FORMS[self.form](x @ weight.to(x.dtype)).clamp_min(self.eps)

    def mix(self, tokens: Tokens, state: Any) -> tuple[Tensor, Remembered]:
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (tokens.turned_q, tokens.turned_k, tokens.v))
        old, length = state or self.nothing(k, v), k.shape[2]
        there = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if tokens.keep is None else tokens.keep
        k, v, there = torch.cat((old.k, k), 2), torch.cat((old.v, v), 2), torch.cat((old.there, there), 1)
        near = window_sums(q, k, v, self.window, self.scaling, None if bool(there.all()) else there)
        # A key is older than the window of the token that comes w later.
        gone = max(0, k.shape[2] - self.window)
        older_k, older_v = tokens.repeated(k[:, :, :gone]), tokens.repeated(v[:, :, :gone])
        phi = self.features(older_k, self.key_map) * there[:, None, :gone, None]
        older_v = F.pad(torch.where(there[:, None, :gone, None], older_v, 0.0), (0, 1), value=1.0)
        phi, older_v = (F.pad(x, (0, 0, length - gone, 0)) for x in (phi, older_v))
        far, sums = step(self.features(q, self.query_map), phi, older_v, OLDER, old.older, mask=Causal())
        g = torch.sigmoid(self.gamma.to(q.dtype))
        far = far * (1 - g) if self.affine else far
        if self.stabilise == "exact":  # everything over exp(max(m, 0)), which the quotient does not feel
            up = near.top.clamp_min(0)
            g, far = g * torch.exp(near.top - up), far * torch.exp(-up)
        mass = g * near.mass + far[..., -1:]
        out = (g * near.values + far[..., :-1]) / torch.where(mass == 0, 1.0, mass)
        last = slice(max(0, k.shape[2] - self.window), None)
        return out, Remembered(k[:, :, last], v[:, :, last], there[:, last], sums)  # type: ignore[arg-type]

    def nothing(self, k: Tensor, v: Tensor) -> Remembered:
        return Remembered(k[:, :, :0], v[:, :, :0], torch.ones_like(k[:, 0, :0, 0], dtype=torch.bool), None)


@register("lolcats", kind="function")
def convert_lolcats(
    model: nn.Module, window: int = 64, feature_dim: int = 64, layers: Any = None, seed: int = 0, **options: Any
) -> Conversion:
    """Every attention layer of a transformers decoder (or those numbered in `layers`) in its LoLCATs form, with maps drawn from `seed`.

    options: form "softmax" or "half", eps, gamma and train_gamma (the window's factor before the sigmoid), affine, tie (one map for queries and
    keys), stabilise ("reference" or "exact"). Then `carry_out(conversion, [attention_transfer(...), lora_finetune(...)], draw)`.
    """
    generator = torch.Generator().manual_seed(seed)
    return convert(model, lambda layer: LolcatsAttention(layer, window, feature_dim, generator=generator, **options), layers=layers)


def heads_matched(student: Any, lesson: Lesson) -> Tensor:
    """Mean squared error of each head's output before the output projection, against softmax over the same queries, keys and values."""
    args, kwargs, _ = lesson
    x = args[0] if args else kwargs["hidden_states"]
    with torch.no_grad():
        truth = softmax_heads(student, x, kwargs["position_embeddings"])
    return F.mse_loss(student.heads_of(x, kwargs["position_embeddings"])[0], truth)


def softmax_heads(student: Student, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    tokens = student.projected(x, rotary, None)
    heads = (tokens.turned_q, tokens.repeated(tokens.turned_k), tokens.repeated(tokens.v))
    return F.scaled_dot_product_attention(*heads, is_causal=True, scale=student.scaling)


def attention_transfer(steps: int, lr: float = 1e-2, **options: Any) -> Transfer:
    """The first stage: only maps and factors learn, 1000 times the mean error over layers; texts without padding."""
    given: dict[str, Any] = {"schedule": "plateau", "final_lr": 1e-5, "accumulate": 8, "scale": 1000.0, **options}
    return Transfer(steps, lr, ("*_map", "*.gamma"), loss=heads_matched, **given)


def lora_finetune(steps: int, lr: float = 1e-4, rank: int = 8, alpha: float = 16, **options: Any) -> Lora:
    """The second stage: low-rank updates of q, k, v and o learn from next tokens."""
    given: dict[str, Any] = {"schedule": "plateau", "final_lr": 1e-5, "accumulate": 8, **options}
    return Lora(steps, lr, rank=rank, alpha=alpha, **given)
