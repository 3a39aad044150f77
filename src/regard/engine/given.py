"""What a call gives as a plain tensor, as the algebra says it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..algebra.mask import Mask
from ..algebra.mechanism import Mechanism, Weighted
from ..algebra.position import Bias, Chain
from ..algebra.token_mask import Explicit
from ..errors import RegardError
from .names import resolved


def given_mask(mechanism: str | Mechanism, mask: Tensor, inputs: dict[str, Any]) -> tuple[str | Mechanism, Mask | None, dict[str, Any]]:
    """A mask that is a tensor, as a mask or an added position and its input."""
    if mask.dim() > 4:
        raise RegardError(f"mask has shape {tuple(mask.shape)}; expected at most 4 dimensions, broadcastable to (B, H, Lq, Lk)")
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype == torch.bool:
        return mechanism, Explicit(), {**inputs, "visible": mask}
    if not mask.is_floating_point():
        raise RegardError(f"mask is a {mask.dtype} tensor; expected bool (True: visible) or floating (added to scores)")
    description = resolved(mechanism)
    if not isinstance(description, Weighted):
        raise RegardError(
            f"mask is a {mask.dtype} tensor, but {type(description).__name__} has no scores to add it to; expected no mask, a mask of "
            "regard.algebra that says the same, such as Causal() or Padding(), or a mechanism with scores, such as softmax"
        )
    biased = replace(description, position=Bias() if description.position is None else Chain((description.position, Bias())))  # type: ignore[arg-type]
    seen = mask.detach() != float("-inf")
    if not bool((mask.isfinite() | ~seen).all()):
        raise RegardError("mask holds NaN or inf; expected finite numbers to add to scores, or -inf where a key is hidden")
    inputs = {**inputs, "position_bias": mask}
    if bool(seen.all()):
        return biased, None, inputs
    return biased, Explicit(), {**inputs, "position_bias": torch.where(seen, mask, 0.0), "visible": seen}
