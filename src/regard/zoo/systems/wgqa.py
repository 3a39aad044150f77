"""WGQA: grouped key and value heads as learned combinations of a trained model's heads (id 75; Chinnakonduru & Mohapatra, 2024).

W^(g) = sum over the heads h of group g of w_h W^h, for K and V each: w_h a number ("scalar"), one an output channel ("col"), or one an
input channel ("row"); w = G / H at first (mean pooling, GQA), or drawn. `fold` makes plain matrices of it: nothing is left to compute.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError

NAMES = (("k_proj", "v_proj"), ("k", "v"))


class WeightedHeads(nn.Module):
    """A key or value projection (heads * d, dim) that makes `groups` heads: x (..., dim) -> (..., groups * d).

    repeat: each made head `heads / groups` times over, for layers that cannot have fewer key heads than query heads. The projection it is
    made of learns too. init: "mean", "random" (uniform from 0 to 1, by `generator`), a number, or the weights (heads, 1, d or dim).
    """

    def __init__(
        self,
        linear: nn.Linear,
        heads: int,
        groups: int,
        mode: str = "scalar",
        init: str | float | Tensor = "mean",
        repeat: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        rows, dim = linear.weight.shape
        if groups < 1 or heads % groups or rows % heads or mode not in ("scalar", "col", "row"):
            raise RegardError(
                f"heads={heads}, groups={groups}, mode={mode!r}, weight {rows, dim}: expected heads a multiple of groups, rows of heads, and "
                "'scalar', 'col' or 'row'"
            )
        self.heads, self.groups, self.mode, self.repeat = heads, groups, mode, repeat
        self.weight, self.bias = linear.weight, linear.bias
        size = (heads, 1, {"scalar": 1, "col": rows // heads, "row": dim}[mode])
        if isinstance(init, Tensor):
            if init.shape != size:
                raise RegardError(f"init {tuple(init.shape)}: expected {size}")
            w = init.detach().clone().to(self.weight)
        elif init == "random":
            w = torch.rand(size, generator=generator).to(self.weight)
        elif isinstance(init, str) and init != "mean":
            raise RegardError(f"init={init!r}: expected 'mean', 'random', a number, or a tensor")
        else:
            w = torch.full(size, groups / heads if init == "mean" else float(init)).to(self.weight)
        self.mix = nn.Parameter(w)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """The weight (groups * d, dim) and bias of the projection that this one is."""
        parts = self.weight.unflatten(0, (self.heads, -1))
        parts = parts * (self.mix.transpose(1, 2) if self.mode == "col" else self.mix)
        group = (self.groups, self.heads // self.groups)
        weight, bias = parts.unflatten(0, group).sum(1), None
        if self.bias is not None:  # rows scale inputs, which a bias has none of: it is averaged
            own = self.bias.unflatten(0, (self.heads, -1)) * (self.groups / self.heads if self.mode == "row" else self.mix[:, 0])
            bias = own.unflatten(0, group).sum(1)
        if self.repeat:
            weight, bias = (None if x is None else x.repeat_interleave(group[1], 0) for x in (weight, bias))  # type: ignore[assignment]
        return weight.flatten(0, 1), None if bias is None else bias.flatten()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.folded())


def parts_of(layer: Any) -> tuple[tuple[str, str], int, bool]:
    """Names of the key and value projections, key heads, and whether the layer needs as many key heads as query heads."""
    for names in NAMES:
        if all(isinstance(getattr(layer, name, None), (nn.Linear, WeightedHeads)) for name in names):
            break
    else:
        raise RegardError(f"{type(layer).__name__}: expected an attention layer with linear {' or '.join('/'.join(n) for n in NAMES)}")
    width = getattr(layer, "head_dim", None) or getattr(layer, "key_value_proj_dim", None) or getattr(layer, "value_dim", None)
    if width is None:
        raise RegardError(f"{type(layer).__name__}: expected a layer that says its head_dim")
    fixed = not hasattr(layer, "num_key_value_groups") and not hasattr(layer, "kv_heads")
    return names, getattr(layer, names[0]).weight.shape[0] // width, fixed


@register("wgqa", kind="function")
def to_wgqa(
    layer: nn.Module, groups: int, mode: str = "scalar", init: str | float | Tensor = "mean", generator: torch.Generator | None = None
) -> nn.Module:
    """Turn an attention layer of a trained model into one with `groups` key and value heads, in place, and return it.

    layer: regard's `Attention`, a decoder layer's attention of transformers (Llama and its like), or T5's, whose heads are then repeated, so
    that its cache stays as it was. Train all parameters on the task, `mix` too, then `fold_wgqa`. A whole model: `convert_wgqa`.
    """
    host: Any = layer
    names, heads, fixed = parts_of(host)
    for name in names:
        if isinstance(getattr(host, name), WeightedHeads):
            raise RegardError(f"{type(host).__name__}.{name} is a weighted combination already; fold_wgqa it first")
    made = [WeightedHeads(getattr(host, name), heads, groups, mode, init, fixed, generator) for name in names]
    for name, one in zip(names, made, strict=True):
        setattr(host, name, one)
    if hasattr(host, "num_key_value_groups"):
        host.num_key_value_groups *= heads // groups
    if hasattr(host, "kv_heads"):
        host.kv_heads = groups
    return layer


@torch.no_grad()
def fold_wgqa(model: nn.Module) -> nn.Module:
    """Replace every weighted combination in a model by the matrix that it is, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, WeightedHeads):
                weight, bias = child.folded()
                plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
                plain.weight.copy_(weight)
                if bias is not None:
                    plain.bias.copy_(bias)
                setattr(module, name, plain)
    return model


def convert_wgqa(model: nn.Module, groups: int, **options: Any) -> nn.Module:
    """`to_wgqa` in every attention layer of a transformers model, in place; its config then says how many key heads there are."""
    layers = [module for module in model.modules() if any(all(hasattr(module, name) for name in names) for names in NAMES)]
    if not layers:
        raise RegardError(f"{type(model).__name__} has no attention layers with {' or '.join('/'.join(n) for n in NAMES)}")
    for layer in layers:
        to_wgqa(layer, groups, **options)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = groups
    return model
