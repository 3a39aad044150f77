"""What the parts of a layer say of themselves: for tests of what options reach."""

from __future__ import annotations

from typing import Any

from torch import nn

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d)


def eps(net: nn.Module) -> set[float | None]:
    return {m.eps for m in net.modules() if isinstance(m, NORMS)}


def dropped(net: nn.Module) -> list[float]:
    return [m.p for m in net.modules() if isinstance(m, (nn.Dropout, nn.Dropout2d))]


def paths(net: nn.Module) -> list[float]:
    """Rates of dropped paths."""
    return [round(m.rate, 6) for m in net.modules() if type(m).__name__ == "DropPath"]


def plain(net: nn.Module) -> list[str]:
    """Names of linear and convolutional layers without biases."""
    return [name for name, m in net.named_modules() if hasattr(m, "bias") and hasattr(m, "weight") and m.bias is None]


def widths(net: nn.Module) -> list[tuple[int, int]]:
    """Of linear layers, in and out."""
    return [(m.in_features, m.out_features) for m in net.modules() if isinstance(m, nn.Linear)]


def spread(net: nn.Module, name: str) -> tuple[float, float]:
    """Mean and standard deviation of a parameter."""
    found: Any = dict(net.named_parameters())[name].detach()
    return float(found.mean()), float(found.std())
