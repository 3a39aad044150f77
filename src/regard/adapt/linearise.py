"""Distilling a patch's learned inputs to softmax: the first stage of turning a pretrained model linear.

Each layer's maps are trained alone, everything else frozen, so that the weights they imply match the layer's softmax weights:
the loss is -sum_j p_ij log a_ij over visible pairs (cross-entropy; Zhang et al., 2024). What follows, training the model with the patch
in place, is plain training of `model.parameters()` and `patch.inputs.parameters()`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Causal
from ..engine import attend, weights
from ..engine.policy import Policy
from ..errors import RegardError
from ..mechanisms.recurrent.hedgehog import distillation_loss
from .patch import Patch


def distil(patch: Patch, batches: Iterable[dict[str, Tensor]], steps: int = 100, lr: float = 1e-2) -> list[float]:
    """Fit `patch.inputs` on the model's own queries and keys; returns the mean loss of the last tenth of steps, a number per layer.

    batches: keyword arguments of model(**batch), a few short sequences each (weights are held whole while distilling). steps: Adam
    steps a layer. Raises RegardError when the patch has nothing to learn or there are no batches.
    """
    if not any(True for _ in patch.inputs.parameters()):
        raise RegardError("the patch has no learned inputs to distil; expected a mechanism with some, such as 'hedgehog'")
    seen = recorded(patch, batches)
    if not seen:
        raise RegardError("batches is empty; expected at least one")
    return [fit(patch, at, [call for call in seen if call[0] == at], steps, lr) for at in range(len(patch.modules))]


@torch.no_grad()
def recorded(patch: Patch, batches: Iterable[dict[str, Tensor]]) -> list[tuple[int, Tensor, Tensor, Any, float | None]]:
    """(layer, q, k, mask, scale) of every patched layer, while the model runs with its own softmax."""
    calls: list[tuple[int, Tensor, Tensor, Any, float | None]] = []

    def listen(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, scale: float | None) -> Tensor:
        calls.append((patch.modules.index(module), q, k, mask if mask is not None else Causal() if causal else None, scale))
        return attend(q, k, v, "softmax", mask=calls[-1][3], scale=scale)

    own, patch.run = patch.run, listen  # type: ignore[method-assign]
    try:
        for batch in batches:
            patch.model(**batch)
    finally:
        patch.run = own  # type: ignore[method-assign]
    return calls


def fit(patch: Patch, layer: int, calls: list[tuple[int, Tensor, Tensor, Any, float | None]], steps: int, lr: float) -> float:
    inputs = patch.inputs[layer]
    targets = [truth(q, k, mask, scale) for _, q, k, mask, scale in calls]
    optimizer = torch.optim.Adam(inputs.parameters(), lr)
    losses = []
    for step in range(steps):
        _, q, k, mask, scale = calls[step % len(calls)]
        with torch.enable_grad():
            own = (
                None
                if isinstance(patch.mechanism, Policy)
                else weights(q, k, patch.mechanism, mask=mask, scale=patch.scale(scale), **{**inputs(), **patch.given})
            )
            if own is None:
                raise RegardError(f"{type(patch.mechanism).__name__} has no matrix of weights to distil")
            p = targets[step % len(calls)].to(own.dtype)
            loss = distillation_loss(own, p)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def truth(q: Tensor, k: Tensor, mask: Any, scale: float | None) -> Tensor:
    found = weights(q, k, "softmax", mask=mask, scale=scale)
    assert found is not None
    return found
