"""Heads taken out for good: rows of the projections of q, k and v, and columns of the output's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import RegardError
from ..nn.attention import Attention
from ..taps import Site, sites
from ..taps.stream import first_child
from .heads import check_heads
from .tables import Head

NAMES = {
    "q": ("q_proj", "query", "q"),
    "k": ("k_proj", "key", "k"),
    "v": ("v_proj", "value", "v"),
}
COUNTS = ("num_heads", "num_attention_heads", "n_heads", "heads")
KEY_COUNTS = ("num_key_value_heads", "kv_heads")


def rows_of(heads: list[int], width: int) -> Tensor:
    """Numbers of the channels of some heads."""
    return (torch.tensor(heads)[:, None] * width + torch.arange(width)).flatten()


def kept(layer: nn.Linear, rows: Tensor, axis: int) -> None:
    """The linear layer with these outputs (axis 0) or inputs (axis 1) alone, in place: the module and its parameters' settings stay."""
    rows = rows.to(layer.weight.device)
    layer.weight = nn.Parameter(layer.weight.detach().index_select(axis, rows).clone(), layer.weight.requires_grad)
    if axis == 0 and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach().index_select(0, rows).clone(), layer.bias.requires_grad)
    layer.out_features, layer.in_features = layer.weight.shape


def projections(site: Site) -> dict[str, nn.Linear]:
    found = {name: first_child(site.module, paths) for name, paths in NAMES.items()} | {"out": site.stream.projection}
    for name, layer in found.items():
        if not isinstance(layer, nn.Linear):
            raise RegardError(
                f"{type(site.module).__name__} has no linear layer of its own for {name!r}, from which heads could be taken; expected "
                "`ablated`, which gives the same outputs"
            )
    return found  # type: ignore[return-value]


def prune(model: nn.Module, heads: Iterable[Head]) -> int:
    """Remove heads (layer, head) from the model in place, and give the number of parameters that went: outputs are those of `ablated`.

    Key and value heads go with the last query head that reads them, so that caches shrink too. RegardError, before anything changes, for
    layers that would keep no head, groups of query heads that would become unequal, learned biases or norms a head, and projections that
    several tensors share (fused q, k, v). Heads are numbered anew behind those removed; a copy of the weights loads into a model pruned alike.
    """
    chosen, known = check_heads(model, heads), {site.layer: site for site in sites(model)}
    plans = []
    for layer in sorted({layer for layer, _ in chosen}):
        site, gone = known[layer], {head for at, head in chosen if at == layer}
        group = site.heads // site.kv_heads
        left = [head for head in range(site.heads) if head not in gone]
        if not left:
            raise RegardError(f"heads takes all of layer {layer}; expected one head or more to stay in each layer")
        shared = sorted({head // group for head in left})
        sizes = {sum(head // group == kv for head in left) for kv in shared}
        if len(sizes) > 1:
            raise RegardError(
                f"heads leaves groups of {sorted(sizes)} query heads to a key head in layer {layer}; expected as many from each of the groups "
                "that stay, or `ablated`"
            )
        found = projections(site)
        width = found["q"].out_features // site.heads
        if width * site.heads != found["q"].out_features or found["out"].in_features % site.heads:
            raise RegardError(f"{type(site.module).__name__} in layer {layer} has gated or unequal heads; expected `ablated`")
        if has_more(site, found):
            raise RegardError(
                f"{type(site.module).__name__} in layer {layer} has parameters a head beside its projections; expected `ablated`"
            )
        plans.append((site, left, shared, found))
    before = sum(p.numel() for p in model.parameters())
    for site, left, shared, found in plans:
        cut(site, left, shared, found)
    return before - sum(p.numel() for p in model.parameters())


def has_more(site: Site, found: dict[str, nn.Linear]) -> bool:
    """Whether the layer learns something a head beside its projections: biases of positions, sinks, gates, convolutions."""
    module = site.module
    known = {f"{name}.{own}" for name, child in module.named_modules() if child in found.values() for own in ("weight", "bias")}
    more = {name: p for name, p in module.named_parameters() if name not in known}
    if isinstance(module, Attention):
        return bool(more)
    return hasattr(module, "has_relative_attention_bias") or any(site.heads in p.shape and "norm" not in name for name, p in more.items())


def cut(site: Site, left: list[int], shared: list[int], found: dict[str, nn.Linear]) -> None:
    widths = {"q": site.heads, "k": site.kv_heads, "v": site.kv_heads}
    for name, count in widths.items():
        kept(found[name], rows_of(left if name == "q" else shared, found[name].out_features // count), 0)
    kept(found["out"], rows_of(left, found["out"].in_features // site.heads), 1)
    module = site.module
    for names, number in ((COUNTS, len(left)), (KEY_COUNTS, len(shared))):
        for name in names:
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, number)
    if not any(isinstance(getattr(module, name, None), int) for name in COUNTS):
        module.num_heads = len(left)  # type: ignore[assignment]
    if hasattr(module, "num_key_value_groups"):
        module.num_key_value_groups = len(left) // len(shared)  # type: ignore[assignment]
        module.num_key_value_heads = len(shared)  # type: ignore[assignment]
    if hasattr(module, "all_head_size"):
        module.all_head_size = found["q"].out_features  # type: ignore[assignment]
