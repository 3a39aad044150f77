"""The Triton executor: one weighted template whose elementwise parts are printed from the mechanism's traced functions."""

from __future__ import annotations

from ...algebra.mask import Mask
from ...algebra.mechanism import Weighted
from ...algebra.normalizer import RowLocal
from ...algebra.part import Sizes
from ...errors import MissingDependency
from ..kernels import declared_sides
from ..symbolic import Untraceable

try:
    import triton  # noqa: F401
except ImportError as _missing:
    raise MissingDependency("the Triton executor needs triton: pip install 'regard[triton]'") from _missing

from .generate import generate, mask_expression
from .run import run

__all__ = ["refusal", "run", "source_of"]


def refusal(mechanism: Weighted, mask: Mask, sizes: Sizes, input_grad: bool) -> str:
    """Why the generated kernel cannot run a mechanism, or the empty string."""
    normalizer = mechanism.normalizer
    if not isinstance(normalizer, RowLocal) or normalizer.shift == "root":
        return "root shifts are not in the kernel yet"
    if not mechanism.score.dot:  # type: ignore[union-attr]
        return "the kernel pairs q and k by dot products"
    if mechanism.select is not None and getattr(mechanism.select, "top_k", None) is not None:
        return "each query selects for itself, which the kernel's blocks of queries cannot follow"
    if sizes.head_dim > 256 or sizes.value_dim > 256:
        return "head_dim and value_dim up to 256"
    if input_grad:
        return "gradients of inputs other than q, k and v"
    try:
        mask_expression(mask)
        generate(mechanism, mask, declared_sides(mechanism))
    except Untraceable as why:
        return str(why)
    except (AttributeError, KeyError, TypeError, IndexError):
        return "its mask reads tensors"
    return ""


def source_of(mechanism: Weighted, mask: Mask) -> str:
    """The generated kernels' source for a mechanism under a mask."""
    return generate(mechanism, mask, declared_sides(mechanism)).text
