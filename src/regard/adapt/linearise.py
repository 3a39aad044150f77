"""Distilling a patch's learned inputs to softmax: the first stage of turning a pretrained model linear.

Each layer's maps are trained alone, everything else frozen, so that the weights they imply match the layer's softmax weights:
the loss is -sum_j p_ij log a_ij over visible pairs (cross-entropy; Zhang et al., 2024). What follows, training the model with the patch
in place, is plain training of `model.parameters()` and `patch.inputs.parameters()`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine import weights
from ..engine.policy import Policy
from ..errors import RegardError
from .call import Call
from .patch import Patch
from .sight import pieces


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
    return [fit(patch, at, [call for call in seen if call.layer == at], steps, lr) for at in range(len(patch.modules))]


@dataclass
class Seen:
    """A piece of an attention call: q, k, what its own softmax's weights are, and the options of `weights` there."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    softmax: Tensor
    mask: Any
    scale: float | None


@torch.no_grad()
def recorded(patch: Patch, batches: Iterable[dict[str, Tensor]]) -> list[Seen]:
    """Every document of every patched layer, while the model runs its own attention."""
    calls: list[Seen] = []

    def listen(call: Call) -> None:
        sight, (q, k, v) = call.sight(True), call.heads()
        if call.softcap is not None or call.sinks is not None or call.bias(sight) is not None:
            raise RegardError("the model's attention has a softcap, sinks or a bias, which the mechanism to distil cannot imitate")
        k, v = k[:, :, : sight.k_len], v[:, :, : sight.k_len]
        for piece in pieces(sight, q.shape[0]):
            heads = piece.heads(q, k, v)
            p = weights(heads[0], heads[1], "softmax", mask=piece.mask, scale=call.scale, **piece.reads)
            assert p is not None
            calls.append(Seen(patch.modules.index(call.module), *heads, p, piece.mask, call.scale))

    own, patch.run = patch.run, listen  # type: ignore[method-assign, assignment]
    try:
        for batch in batches:
            patch.model(**batch)
    finally:
        patch.run = own  # type: ignore[method-assign]
    return calls


def fit(patch: Patch, layer: int, calls: list[Seen], steps: int, lr: float) -> float:
    inputs = patch.inputs[layer]
    optimizer = torch.optim.Adam(inputs.parameters(), lr)
    losses = []
    for step in range(steps):
        seen = calls[step % len(calls)]
        with torch.enable_grad():
            own = (
                None
                if isinstance(patch.mechanism, Policy)
                else weights(
                    seen.q,
                    seen.k,
                    patch.mechanism,
                    mask=seen.mask,
                    scale=patch.scale(seen.scale),
                    **{**inputs(None, {"q": seen.q, "k": seen.k, "v": seen.v}), **patch.given},
                )
            )
            if own is None:
                raise RegardError(f"{type(patch.mechanism).__name__} has no matrix of weights to distil")
            loss = distillation_loss(own, seen.softmax.to(own.dtype))
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Soft cross-entropy - sum_ij P_ij log a_ij, mean over batch, heads and queries, of weights (B, H, Lq, Lk).

    teacher: softmax weights P of the frozen model; student: the linear weights a. Masked pairs are zero in both.
    """
    if student.shape != teacher.shape:
        raise RegardError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}: expected the same shape")
    tiny = torch.finfo(student.dtype).tiny
    return -(teacher * student.clamp_min(tiny).log()).sum(-1).mean()
