"""The Triton executor: one weighted template whose elementwise parts are printed from the mechanism's traced functions."""

from __future__ import annotations

from ...algebra.mask import Mask
from ...algebra.mechanism import Weighted
from ...algebra.normalizer import RowLocal
from ...algebra.part import Sizes
from ...errors import MissingDependency, RegardError
from ..kernels import declared_sides
from ..symbolic import Untraceable

try:
    import triton  # noqa: F401
except ImportError as _missing:
    raise MissingDependency("the Triton executor needs triton: pip install 'regard[triton]'") from _missing

from .generate import generate
from .run import run, takes

__all__ = ["refusal", "run", "source_of", "takes"]


def refusal(mechanism: Weighted, mask: Mask, sizes: Sizes) -> str:
    """Why the generated kernel cannot run a mechanism, or the empty string."""
    normalizer = mechanism.normalizer
    if not isinstance(normalizer, RowLocal):
        return f"{type(normalizer).__name__} is not given by elementwise functions"
    if not mechanism.score.dot:  # type: ignore[union-attr]
        return "the kernel pairs q and k by dot products"
    if mechanism.select is not None and getattr(mechanism.select, "top_k", None) is not None:
        return "each query selects for itself, which the kernel's blocks of queries cannot follow"
    if sizes.head_dim > 256 or sizes.value_dim > 256:
        return "head_dim and value_dim up to 256"
    try:
        generate(mechanism, mask, declared_sides(mechanism, mask))
    except Untraceable as why:
        return str(why)
    except (AttributeError, KeyError, TypeError, IndexError, RegardError):
        return "its mask is no expression of b, h, i, j and elementwise tensors"
    return ""


def source_of(mechanism: Weighted, mask: Mask) -> str:
    """The generated kernels' source for a mechanism under a mask."""
    return generate(mechanism, mask, declared_sides(mechanism, mask)).text
