"""The matrices of each head, in whichever way a host's layers hold them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import RegardError
from ..taps import Site
from ..taps.stream import first_child
from .surgery import NAMES

FUSED = ("c_attn", "qkv", "Wqkv", "query_key_value")


@dataclass(frozen=True)
class HeadWeights:
    """Acting on rows x (.., dim): q = x @ wq[h] + bq[h]. wq, wk, wv (H, dim, d), bq, bk, bv (H, d), wo (H, d, dim), bo (dim,); key and value
    matrices that several query heads share are repeated. scale: of the scores."""

    wq: Tensor
    bq: Tensor
    wk: Tensor
    bk: Tensor
    wv: Tensor
    bv: Tensor
    wo: Tensor
    bo: Tensor
    scale: float


def rows_of(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """(weight (in, out), bias (out,)) of nn.Linear, or of a layer that holds them turned (GPT-2's Conv1D)."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    assert isinstance(weight, Tensor)
    weight = weight.T if isinstance(layer, nn.Linear) else weight
    return weight.detach(), weight.new_zeros(weight.shape[1]).detach() if bias is None else bias.detach()


def head_weights(site: Site) -> HeadWeights:
    """RegardError for layers whose projections are not known by name. Rotary positions and norms of q and k are not in them."""
    module, heads, kv = site.module, site.heads, site.kv_heads
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for name, paths in NAMES.items():
        found = first_child(module, paths)
        if found is not None and hasattr(found, "weight"):
            parts[name] = rows_of(found)
    fused = first_child(module, FUSED)
    if not parts and fused is not None:
        weight, bias = rows_of(fused)
        if (
            weight.shape[1] % 3 == 0
            and heads == kv
            and type(fused).__name__ in ("Linear", "Conv1D")
            and not hasattr(module, "query_key_value")
        ):
            parts = dict(zip("qkv", zip(weight.chunk(3, 1), bias.chunk(3), strict=True), strict=True))
    if set(parts) != {"q", "k", "v"} or site.stream.projection is None:
        raise RegardError(
            f"{type(module).__name__} holds its projections in a way that is not known; expected layers q, k, v and out, or q, k, v in one"
        )

    def cut(name: str, count: int) -> tuple[Tensor, Tensor]:
        weight, bias = parts[name]
        w, b = weight.unflatten(1, (count, -1)).transpose(0, 1), bias.unflatten(0, (count, -1))
        return w.repeat_interleave(heads // count, 0), b.repeat_interleave(heads // count, 0)

    out, shift = rows_of(site.stream.projection)
    width = parts["q"][0].shape[1] // heads
    scale = getattr(module, "scaling", getattr(module, "scale", None))
    (wq, bq), (wk, bk), (wv, bv) = cut("q", heads), cut("k", kv), cut("v", kv)
    return HeadWeights(
        wq, bq, wk, bk, wv, bv, out.unflatten(0, (heads, -1)), shift, float(scale) if isinstance(scale, float) else width**-0.5
    )


def written(site: Site, z: Tensor) -> Tensor:
    """What each head adds to the stream: z (B, H, L, d) of the point "heads" -> (B, H, L, dim), without the projection's bias."""
    return torch.einsum("bhld,hdm->bhlm", z, head_weights(site).wo.to(z.dtype))
