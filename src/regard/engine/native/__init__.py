"""The native executor: the weighted template in C, its elementwise parts printed from the mechanism's traced functions."""

from __future__ import annotations

from typing import Any

from ...algebra.mask import Mask
from ...algebra.mechanism import Weighted
from ...algebra.normalizer import RowLocal
from ...algebra.part import Sizes, asks
from ...errors import RegardError
from ..kernels import declared_sides
from ..symbolic import Untraceable
from ..tiled.stage import position_of
from .build import block
from .build import problem as build_problem
from .generate import generate
from .run import run, takes

__all__ = ["block", "refusal", "run", "source_of", "takes"]


def refusal(mechanism: Weighted, mask: Mask, sizes: Sizes, dtype: Any, device: Any) -> str:
    """Why compiled C cannot run a mechanism here, or the empty string."""
    import torch

    normalizer = mechanism.normalizer
    if device.type != "cpu":
        return "runs on a CPU"
    if dtype == torch.float64:
        return "computes in float32"
    if not isinstance(normalizer, RowLocal) or not mechanism.score.raw:  # type: ignore[union-attr]
        return "pairs q and k by dot products or distances"
    if max(sizes.head_dim, sizes.value_dim) > 512:
        return "head_dim and value_dim up to 512"
    raw = {item.name for item in mechanism.declared if not item.elementwise}
    asked = {name for f in (position_of(mechanism), normalizer.weight, normalizer.mass) if f for name in asks(f, 1)}
    if raw & asked:
        return f"reads {sorted(raw & asked)[0]!r} as a whole"
    if normalizer.shift == "root" and not root_is_free(mechanism):
        return "roots of weights that depend on the key's place"
    try:
        generate(mechanism, mask, declared_sides(mechanism, mask))
    except Untraceable as why:
        return str(why)
    except (AttributeError, KeyError, TypeError, IndexError, RegardError):
        return "its mask is no expression of b, h, i, j and elementwise tensors"
    return build_problem()


def root_is_free(mechanism: Weighted) -> bool:
    normalizer: Any = mechanism.normalizer
    wanted = {name for f in (normalizer.weight, normalizer.floor) if callable(f) for name in asks(f, int(f is normalizer.weight))}
    return "j" not in wanted and not any(item.name in wanted and "k" in item.shape for item in mechanism.declared)


def source_of(mechanism: Weighted, mask: Mask) -> str:
    """The generated kernels' source for a mechanism under a mask."""
    return generate(mechanism, mask, declared_sides(mechanism, mask)).text
