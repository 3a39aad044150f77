"""Norm loss: rows of weights drawn towards the unit sphere, in place of weight decay (id 52; Georgiou et al., 2021).

L = lam sum_layers sum_c (1 - |w_c|)^2,  dL/dw_c = 2 lam (|w_c| - 1) w_c / |w_c|: radial, decay above norm one and growth below
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regard.catalog.registry import register
from regard.errors import RegardError

LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
OF_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
Source = nn.Module | Iterable[Tensor]


def weights_of(source: Source) -> list[tuple[str, Tensor, int, int]]:
    """(name, weight, dimension of its output units, groups that the other dimension of a transposed convolution is cut into) of every
    linear, convolutional and attention layer, each weight once; of bare tensors, dimension 0."""
    if not isinstance(source, nn.Module):
        return [(str(at), weight, 0, 1) for at, weight in enumerate(source)]
    found: dict[int, tuple[str, Tensor, int, int]] = {}
    for name, layer in source.named_modules():
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            own = {"weight": (layer.weight, 1, layer.groups)}
        elif isinstance(layer, LAYERS):
            own = {"weight": (layer.weight, 0, 1)}
        elif isinstance(layer, nn.MultiheadAttention):
            own = {key: (getattr(layer, key), 0, 1) for key in OF_ATTENTION if getattr(layer, key) is not None}
        else:
            continue
        for key, (weight, dim, groups) in own.items():
            found.setdefault(id(weight), (f"{name}.{key}".strip("."), weight, dim, groups))
    return list(found.values())


def as_rows(weight: Tensor, dim: int, groups: int = 1) -> Tensor:
    """(output units, fan in), a view where memory allows."""
    if weight.dim() < 2:
        raise RegardError(f"a weight has shape {tuple(weight.shape)}; expected two dimensions or more (biases and norms have no rows)")
    if groups > 1:  # (inputs, outputs a group, ...): an output reads the inputs of its group
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        dim = 0
    return weight.movedim(dim, 0).flatten(1)


def norms_of(weight: Tensor, dim: int, groups: int = 1) -> Tensor:
    """Norms of rows, in float32 at least: (output units,)."""
    rows = as_rows(weight, dim, groups)
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))


def chosen(source: Source, row_dim: int | None) -> list[tuple[str, Tensor, int, int]]:
    found = weights_of(source)
    if not found:
        raise RegardError("source holds no weight of a linear, convolutional or attention layer; expected at least one")
    return found if row_dim is None else [(name, weight, row_dim, 1) for name, weight, _, _ in found]


@register("norm-loss", kind="function")
def norm_loss(source: Source, lam: float = 1e-2, row_dim: int | None = None) -> Tensor:
    """lam sum_c (1 - |w_c|)^2 over the rows of all weights: a scalar to add to a loss, with no other weight decay.

    source: a module, all of whose linear, convolutional and attention weights count once (no biases, norms or embeddings), or weights.
    row_dim: the dimension of output units (None: the layer's own, 0 for bare weights). A row of zeros has no direction: gradient zero.
    """
    terms = [(1 - norms_of(weight, dim, groups)).square().sum() for _, weight, dim, groups in chosen(source, row_dim)]
    return lam * torch.stack([term.to(terms[0].device, torch.promote_types(term.dtype, terms[0].dtype)) for term in terms]).sum()


def decoupled_norm(optimizer: torch.optim.Optimizer, source: Source, lam: float = 1e-2, row_dim: int | None = None) -> RemovableHandle:
    """AdamW's way: before each step of `optimizer`, w_c -= lr 2 lam (|w_c| - 1) w_c / |w_c| with the rate of the weight's group, apart from the
    gradient's scaling. Give the optimizer weight_decay=0. The handle's remove() ends it."""
    known = {id(weight): (weight, dim, groups) for _, weight, dim, groups in chosen(source, row_dim)}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not known.keys() & held:
        raise RegardError("none of the source's weights is the optimizer's; expected parameters of the same model")
    if any(group.get("weight_decay") and any(id(p) in known for p in group["params"]) for group in optimizer.param_groups):
        raise RegardError("the optimizer decays these weights too; expected weight_decay=0 in their group")

    @torch.no_grad()
    def draw(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in known or p.grad is None:
                    continue
                weight, dim, groups = known[id(p)]
                norms = norms_of(weight, dim, groups).clamp_min(torch.finfo(torch.float32).tiny)
                factor = (1 - 2 * lam * group["lr"] * (norms - 1) / norms).to(weight.dtype)
                shape = [1] * weight.dim()
                if groups > 1:
                    weight.unflatten(0, (groups, -1)).mul_(factor.view(groups, 1, -1, *shape[2:]))
                else:
                    shape[dim] = -1
                    weight.mul_(factor.view(shape))

    return optimizer.register_step_pre_hook(draw)


@torch.no_grad()
def row_spread(source: Source, row_dim: int | None = None) -> dict[str, dict[str, float]]:
    """For each weight the least, mean and largest norm of its rows and their standard deviation."""
    found = {name: norms_of(weight, dim, groups) for name, weight, dim, groups in chosen(source, row_dim)}
    return {
        name: {"min": float(n.min()), "mean": float(n.mean()), "max": float(n.max()), "std": float(n.std(correction=0))}
        for name, n in found.items()
    }
