"""A registered layer in the slot of a small convolutional net: its width, its layout, or why it does not fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...catalog import records
from ...catalog.registry import entry
from ...errors import RegardError
from ...nn import Attention
from ...nn.images.grid import DRESSES, GridAttention
from ...nn.images.slot_net import SlotNet
from ...nn.mixers import parsed

PLAIN = "none"  # the net without anything in its slot
HEADS = 4

Layout = Callable[[nn.Module, Tensor], Any]


def first(out: Any) -> Any:
    """A layer's output, of which some give also their weights or masks."""
    return out[0] if isinstance(out, tuple) else out


LAYOUTS: dict[str, Layout] = {  # how a layer may take a map (B, C, H, W), and give it back
    "map": lambda layer, x: first(layer(x)),
    "tokens": lambda layer, x: first(layer(x.flatten(2).mT)).mT.unflatten(2, x.shape[2:]),
    "map, channels last": lambda layer, x: first(layer(x.movedim(1, -1))).movedim(-1, 1),
}
WIDTHS = ("channels", "dim", "d_model")
OWN: dict[str, dict[str, Any]] = {"hyperzzw": {"factor": 1, "groups": 4}}  # so that as many channels come out as go in


class Fitted(nn.Module):
    """A layer that takes maps (B, C, H, W) in the layout it knows."""

    def __init__(self, layer: nn.Module, layout: str):
        super().__init__()
        self.layer, self.layout = layer, layout

    def forward(self, x: Tensor) -> Tensor:
        return LAYOUTS[self.layout](self.layer, x)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return self.layout


def made(spec: str, channels: int, side: int) -> nn.Module:
    """The layer of "name:key=value,..." for maps of `channels` and side x side pixels; RegardError where it needs more to be told than that."""
    name, options = parsed(spec)
    if name == "softmax":
        return Attention(channels, HEADS, causal=False, **options)
    if name in DRESSES:
        return GridAttention(channels, HEADS, (side, side), name, **options)
    found = entry(name)
    if found.kind != "module":
        raise RegardError(f"{name!r} is no layer but a {found.kind}; expected a layer that gives a map back as large as it took it")
    parameters = inspect.signature(found.factory).parameters
    known = {**dict.fromkeys(WIDTHS, channels), "heads": HEADS, "side": side, "tokens": side * side, "shape": (side, side)}
    given = {key: value for key, value in known.items() if key in parameters and key not in options}
    given = {key: value for key, value in given.items() if key != "heads" or parameters[key].default is inspect.Parameter.empty}
    needed = [key for key, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD and key not in given | options]
    if needed or not any(key in given for key in WIDTHS):
        raise RegardError(f"{name!r} also needs {', '.join(needed) or 'no width'}; expected a layer that is made of a width of channels")
    return found.factory(**{**given, **OWN.get(name, {}), **options})  # type: ignore[no-any-return]


def fitted(spec: str, channels: int, side: int) -> Fitted:
    """The layer in the first layout in which it takes a map and gives one back; RegardError says how it refused each."""
    layer, refused = made(spec, channels, side), []
    x = torch.zeros(2, channels, side, side)
    kept = torch.get_rng_state()
    for layout, run in LAYOUTS.items():
        try:
            with torch.no_grad():
                out = run(layer.eval(), x)
        except (RegardError, TypeError, AttributeError, RuntimeError, ValueError) as why:
            refused.append(f"as {layout}: {' '.join(str(why).split())[:90]}")
            continue
        finally:
            torch.set_rng_state(kept)
        if isinstance(out, Tensor) and out.shape == x.shape:
            return Fitted(layer.train(), layout)
        refused.append(f"as {layout}: gives {tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__}")
    raise RegardError(f"{spec!r} does not fit maps of {channels} channels, {side} x {side}: {'; '.join(refused)}")


def net_of(spec: str, side: int, widths: tuple[int, ...], classes: int, colours: int = 3) -> SlotNet:
    """The small net with the layer in every block's slot; halved sides from block to block."""
    sides = iter([max(1, side >> at) for at in range(len(widths))])

    def slot(width: int) -> nn.Module:
        return fitted(spec, width, next(sides))

    return SlotNet(colours, classes, None if spec == PLAIN else slot, widths)


def fitting(family: str = "vision") -> list[str]:
    """Softmax, the linear mechanisms that have a layer for grids, and the layers of a family that fit a small net."""
    found = ["softmax", *DRESSES]
    for record in records(family, "works"):
        try:
            fitted(record.slug, 16, 8)
        except RegardError:
            continue
        found.append(record.slug)
    return found
