"""Normalized attention without the probability cage: standardised logits as weights (id 2; Richter & Wattenhofer, 2020).

p_ij = g_h (s_ij - mean_j s_i) / (std_j s_i + eps) + b_h,   s_ij = q_i.k_j        weights may be negative; a row sums to n_i b_h
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Dot, Input, Learned, Recipe, RowLocal, RowWise, Weighted, bind, identity, row_mean
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError


def standardised(s: Tensor, seen: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    away = s - row_mean(s, seen)
    variance = row_mean(away.square(), seen)
    spread = torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)  # no infinite slope at 0
    return gain * away / (spread + eps) + shift


def root_visible(total: Tensor, n: Tensor) -> Tensor:
    return n.clamp_min(1).sqrt()


def root_of(total: Tensor, length: float) -> Tensor:
    return torch.full_like(total, length**0.5)


@register("nap")
def nap(
    eps: float = 1e-3, variant: str = "nap", activation: str = "gelu_tanh", norm_eps: float = 1e-3, length: int | None = None
) -> Weighted:
    """Inputs `gain` and `shift`, one a head, start at 1 and 0. The layer puts LayerNorm (norm_eps) and GELU ("gelu_tanh", or "gelu" by erf as
    the released graph code, whose eps is 0 and norm_eps 1e-5) between heads and projection.

    variant: "nap"; or the paper's comparisons "non" (scores q.k / sqrt(D), output / sqrt(n_i), n_i the visible keys, or `length` for all
    rows, as released: that of the padded batch) and "mte" (softmax, then LayerNorm and GELU).
    """
    block = Recipe(merge_norm="layer", norm_eps=norm_eps, merge_activation=activation)
    if variant == "nap":
        inputs = (Input("gain", "h", default=1.0, layer=Learned(1.0)), Input("shift", "h", default=0.0, layer=Learned(0.0)))
        return Weighted(score=Dot(power=0.0), normalizer=RowWise(bind(standardised, eps=eps), inputs), recipe=block)
    if variant == "non":
        divide = root_visible if length is None else bind(root_of, length=float(length))
        return Weighted(normalizer=RowLocal(identity, divide=divide), recipe=Recipe(merge_activation=activation))
    if variant == "mte":
        return Weighted(recipe=block)
    raise RegardError(f"variant={variant!r}; expected nap, non or mte")


class PooledValues(nn.Module):
    """The paper's other comparison, x (B, L, dim) -> (B, L, dim): W_o of the "max" or "sum" of W_v x over the tokens, the same for each.

    merged: LayerNorm (norm_eps) and GELU in between, as in the attention layers.
    """

    def __init__(self, dim: int, kind: str = "max", merged: bool = True, norm_eps: float = 1e-3):
        super().__init__()
        if kind not in ("max", "sum"):
            raise RegardError(f"kind={kind!r}; expected max or sum")
        self.kind, self.v, self.out = kind, nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm = nn.Sequential(nn.LayerNorm(dim, norm_eps), nn.GELU(approximate="tanh")) if merged else nn.Identity()

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """keep: (B, L) bool, False at padding; a sample without tokens pools to 0."""
        v = self.v(x)
        kept = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if keep is None else keep
        if self.kind == "sum":
            pooled = torch.where(kept[..., None], v, 0.0).sum(1, keepdim=True)
        else:
            pooled = torch.where(kept[..., None], v, float("-inf")).amax(1, keepdim=True)
            pooled = torch.where(kept.any(1)[:, None, None], pooled, 0.0)
        return self.out(self.norm(pooled)).expand_as(x)  # type: ignore[no-any-return]


def token_spread(
    variant: str, lengths: Sequence[int] = (16, 64, 256, 1024), std: float = 0.1, width: int = 64, seed: int = 0
) -> list[float]:
    """The study of initialisation: for each length n the deviation between tokens of what heads read (mean over channels), at random logits of
    deviation `std` and standard normal values. variant: of `nap`, or "softmax", whose tokens draw together as n^-1/2; "nap" and "mte" are seen
    behind their LayerNorm."""
    mechanism: str | Weighted = variant if variant == "softmax" else nap(variant=variant)
    generator, found = torch.Generator().manual_seed(seed), []
    for n in lengths:
        s, v = std * torch.randn(1, 1, n, n, generator=generator), torch.randn(1, 1, n, width, generator=generator)
        out = attend(s, torch.eye(n)[None, None], v, mechanism, scale=1.0)[0, 0]
        out = F.layer_norm(out, (width,)) if variant in ("nap", "mte") else out
        found.append(float(out.std(0).mean()))  # std over tokens
    return found
