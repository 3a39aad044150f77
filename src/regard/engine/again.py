"""Second derivatives: a gradient that is itself asked for its gradient is computed once more, by functions that autograd follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable(
    function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradient of `function(*tensors)` against `grads`, with a graph of its own: one for each tensor that requires it, else None."""
    with torch.enable_grad():
        named = [None if x is None else x.view_as(x) for x in tensors]  # one tensor may stand in several places
        outputs = function(*named)
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad]
        wanted = [x for x in named if x is not None and x.requires_grad]
        found = iter(
            torch.autograd.grad([out for out, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=True, allow_unused=True)
            if pairs
            else [None] * len(wanted)
        )
    return [next(found) if x is not None and x.requires_grad else None for x in named]
