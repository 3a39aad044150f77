"""What each component of a model adds to the residual stream of one row, and what a layer's norm makes of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import taps
from ..errors import RegardError
from ..taps.stream import first_child
from .rotary import turns_of
from .weights import HeadWeights, head_weights, written

NORMS = ("input_layernorm", "ln_1", "norm1", "layernorm_before", "layer_norm1", "self_attn_layer_norm", "attn_norm")


@dataclass(frozen=True)
class Part:
    """One layer on a row of L tokens. stream (L, D) before it; x (L, D): what its projections read; written (H, L, D): what heads add;
    mlp (L, D) or None; pattern, logits (H, L, L). group: query heads a key head. turns (L, d, d): what rotary positions make of a token's
    query or key, or None."""

    layer: int
    stream: Tensor
    x: Tensor
    written: Tensor
    mlp: Tensor | None
    pattern: Tensor
    logits: Tensor
    weights: HeadWeights
    group: int
    norm: nn.Module | None
    turns: Tensor | None = None

    def behind(self, out: Tensor, token: int) -> Tensor:
        """A summand (D,) of the stream at a token as it comes through the norm, whose scale is the whole stream's."""
        return share(self.norm, out, self.stream[token])


def share(norm: nn.Module | None, out: Tensor, whole: Tensor) -> Tensor:
    """The part of norm(whole) that is linear in a summand `out`: behind it come only the norm's own biases."""
    if norm is None or isinstance(norm, nn.Identity):
        return out
    weight = getattr(norm, "weight", None)
    factor: Tensor | float = 1.0 if not isinstance(weight, Tensor) else weight.detach()
    if isinstance(norm, nn.LayerNorm):
        scale = (whole.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        return factor * (out - out.mean(-1, keepdim=True)) / scale
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    eps = torch.finfo(whole.dtype).eps if eps is None else float(eps)
    return factor * out / (whole.square().mean(-1, keepdim=True) + eps).sqrt()


@torch.no_grad()
def parts_of(model: nn.Module, ids: Tensor, turned: bool = False) -> list[Part]:
    """ids (1, L) -> each attention layer's part. turned: with what rotary positions make of queries and keys, which takes one more pass. RegardError for blocks without a norm in front of attention that is known by name (or any
    at all), and for norms that are neither LayerNorm nor RMSNorm."""
    if ids.shape[0] != 1:
        raise RegardError(f"ids has {ids.shape[0]} rows; expected one")
    found = taps.sites(model)
    points = ["residual_in", "heads", "weights", "logits"]
    with_mlp = [site.layer for site in found if site.stream.mlp is not None]
    with taps.read(model, points) as seen:
        if with_mlp:
            with taps.read(model, "mlp", layers=with_mlp) as mlps:
                model(ids)
        else:
            model(ids)
    out, turns = [], turns_of(model, ids) if turned else {}
    for site in found:
        block = site.stream.block
        norm = None if block is None else first_child(block, NORMS)
        stream = seen["residual_in", site.layer][0]
        x = stream if norm is None else norm(stream)
        bias = getattr(norm, "bias", None)
        made = share(norm, stream, stream) + (0 if not isinstance(bias, Tensor) else bias)
        if not torch.allclose(made, x, rtol=1e-3, atol=1e-4):
            raise RegardError(f"{type(norm).__name__} in layer {site.layer} is no LayerNorm or RMSNorm; expected one, or none")
        mlp = mlps["mlp", site.layer][0] if site.layer in with_mlp else None
        part = written(site, seen["heads", site.layer])[0]
        pattern, logits = seen["weights", site.layer][0], seen["logits", site.layer][0]
        group = site.heads // site.kv_heads
        out.append(Part(site.layer, stream, x, part, mlp, pattern, logits, head_weights(site), group, norm, turns.get(site.layer)))
    return out
