"""What a layer must own for a mechanism: the parameters, fixed tensors and projections that make the tensors it declares."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Headwise, Input, Learned, Mechanism, Projected, Sizes
from ..engine.composed import inputs_of
from ..errors import RegardError
from .parts import Projection


class Inputs(nn.Module):
    """The tensors a mechanism declares, made from parameters and from x.

    dim: channels of x; None where there is no x to project from, which mechanisms with projected inputs (gates, betas) refuse. given: names
    of inputs that come from elsewhere.
    """

    def __init__(self, mechanism: Mechanism, sizes: Sizes, dim: int | None, given: Collection[str] = ()):
        super().__init__()
        self.items = tuple(item for item in inputs_of(mechanism) if item.layer is not None and item.name not in given)
        self.learned, self.projected = nn.ParameterDict(), nn.ModuleDict()
        self.exact: dict[str, Tensor] = {}
        for item in self.items:
            self.add(item, sizes, dim)

    def add(self, item: Input, sizes: Sizes, dim: int | None) -> None:
        if isinstance(item.layer, Learned):
            value = (
                item.layer.init(sizes)
                if callable(item.layer.init)
                else torch.full([sizes.letter(c) or 1 for c in item.shape], float(item.layer.init))
            )
            if item.shape == "h" and value.dim() == 0:
                value = value.repeat(sizes.heads)
            if item.layer.trainable:
                self.learned[item.name] = nn.Parameter(value.to(torch.get_default_dtype()))
            else:
                self.exact[f"fixed_{item.name}"] = value
                self.register_buffer(f"fixed_{item.name}", value.to(torch.get_default_dtype()))
        elif isinstance(item.layer, Headwise):
            owners, width = {
                "q": (sizes.heads, sizes.head_dim),
                "k": (sizes.kv_heads, sizes.head_dim),
                "v": (sizes.kv_heads, sizes.value_dim),
            }[item.layer.source]
            self.learned[item.name] = nn.Parameter(torch.randn(owners, width) * item.layer.std)
        elif isinstance(item.layer, Projected):
            if dim is None:
                raise RegardError(
                    f"input {item.name!r} is a projection of the layer's x, which there is none of here; pass {item.name}=..."
                )
            channels = item.layer.channels or (sizes.head_dim if item.shape.endswith("d") else 1)
            owners = sizes.kv_heads if item.layer.grouped else sizes.heads
            self.projected[item.name] = Projection(dim, owners, channels * item.layer.times, item.layer.rank, item.layer.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Inputs:
        """A layer made in float32 and moved to float64 gets its constants back in full, unless they were changed."""
        super()._apply(fn, recurse)
        for name, value in self.exact.items():
            held = getattr(self, name)
            if held.dtype == torch.float64 and not (held.is_meta or value.is_meta) and torch.equal(held.cpu(), value.float().double()):
                setattr(self, name, value.to(held))
        return self

    def forward(self, x: Tensor | None = None, heads: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """x (B, L, dim), and the layer's q, k, v (B, heads, L, D) for inputs read off them -> {name: tensor}."""
        made: dict[str, Any] = {}
        for item in self.items:
            if isinstance(item.layer, Headwise):
                if heads is None:
                    raise RegardError(
                        f"input {item.name!r} is read off the heads' {item.layer.source}, which is not at hand; pass {item.name}=..."
                    )
                of = heads[item.layer.source]
                value = ((of if item.layer.act is None else item.layer.act(of)) * self.learned[item.name].unsqueeze(-2)).sum(-1)
            elif item.name in self.projected:
                value = self.projected[item.name](x)
                value = value.squeeze(-1) if value.shape[-1] == 1 and item.shape[-1] not in "df" else value
            else:
                value = self.learned[item.name] if item.name in self.learned else getattr(self, f"fixed_{item.name}")
            assert item.layer is not None
            made[item.name] = item.layer.transform(value) if item.layer.transform is not None else value
        return made
