"""Heads of any tapped model: gates on their outputs, ablation, importance by gradients, and schedules of removal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .. import taps
from ..errors import RegardError
from ..taps.points import At
from .tables import Head, HeadTable, table_of


def head_counts(model: nn.Module) -> list[int]:
    """Query heads of each attention layer, in the order of taps."""
    return [site.heads for site in taps.sites(model)]


def check_heads(model: nn.Module, heads: Iterable[Head]) -> list[Head]:
    counts = head_counts(model)
    try:
        found = [(int(layer), int(head)) for layer, head in heads]
    except TypeError:
        raise RegardError(f"heads={heads!r}; expected pairs (layer, head)") from None
    for layer, head in found:
        if not (0 <= layer < len(counts) and 0 <= head < counts[layer]):
            raise RegardError(f"heads holds {(layer, head)}; expected (layer, head) of a model with {counts} heads in its layers")
    return list(dict.fromkeys(found))


def gated(model: nn.Module, gates: Mapping[int, Tensor]) -> AbstractContextManager[Any]:
    """A `with` block in which each head's output is multiplied by its gate: gates[layer] (H,), or anything that fits (B, H, L, 1)."""

    def scale(x: Tensor, at: At) -> Tensor:
        gate = gates[at.layer]
        gate = gate[:, None, None] if gate.dim() == 1 else gate
        return x * gate.to(x.dtype)

    return taps.edit(model, {"heads": scale}, layers=sorted(gates))


def ablated(model: nn.Module, heads: Iterable[Head]) -> AbstractContextManager[Any]:
    """A `with` block in which these heads, (layer, head), give zeros."""
    chosen, counts = check_heads(model, heads), head_counts(model)
    if not chosen:
        raise RegardError("heads is empty; expected some (layer, head)")
    gates = {layer: torch.ones(counts[layer]) for layer, _ in chosen}
    for layer, head in chosen:
        gates[layer][head] = 0.0

    def cut(x: Tensor, at: At) -> Tensor:
        return torch.where(gates[at.layer].to(x.device).bool()[:, None, None], x, 0.0)

    return taps.edit(model, {"heads": cut}, layers=sorted(gates))


def importance(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    *,
    normalise: str | None = "layer_l2",
    per: str = "token",
    last_layer: str = "examples",
) -> HeadTable:
    """I_h = mean |dL/dxi_h|, xi_h the gate on the head's output: |Att_h . dL/dAtt_h| of every token (per="token"), or of the gate that all
    tokens of an example share (per="example"). loss(batch) runs the model and gives L, a mean over the batch in the released code.

    Sums over tokens, or examples, are divided by the number of tokens that are no padding, or of examples; the last layer's by examples
    (last_layer="examples": the classifier reads one token), or as the others ("tokens"). normalise: "layer_l2" divides each layer by its
    length, I_h / (sqrt(sum_h I_h^2) + 1e-20); None leaves it. Parameters need no gradient and get none.
    Michel et al., 2019, Are Sixteen Heads Really Better than One?
    """
    for name, value, known in (("normalise", normalise, (None, "layer_l2")), ("per", per, ("token", "example"))):
        if value not in known:
            raise RegardError(f"{name}={value!r}; expected one of {known}")
    if last_layer not in ("examples", "tokens"):
        raise RegardError(f"last_layer={last_layer!r}; expected examples or tokens")
    counts = head_counts(model)
    total = [torch.zeros(n, dtype=torch.float64) for n in counts]
    tokens, examples = [0] * len(counts), [0] * len(counts)
    gates: list[tuple[int, Tensor]] = []

    def gate(x: Tensor, at: At) -> Tensor:
        one = torch.ones(*x.shape[:3], 1, dtype=x.dtype, device=x.device, requires_grad=True)
        gates.append((at.layer, one))
        real = at.real is not None and at.real.shape[0] == x.shape[0] and at.real.shape[1] >= at.start + x.shape[2]
        seen = at.real[:, at.start : at.start + x.shape[2]].sum() if real and at.real is not None else x.shape[0] * x.shape[2]
        tokens[at.layer] += int(seen)
        examples[at.layer] += x.shape[0]
        return x * one

    ran = False
    for batch in batches:
        ran = True
        gates.clear()
        with torch.enable_grad(), taps.edit(model, {"heads": gate}):
            slopes = torch.autograd.grad(loss(batch), [one for _, one in gates], allow_unused=True)
        for (layer, _), slope in zip(gates, slopes, strict=True):
            if slope is not None:
                slope = slope.squeeze(-1).double().cpu()
                total[layer] += (slope if per == "token" else slope.sum(-1, keepdim=True)).abs().sum((0, 2))
    if not ran:
        raise RegardError("batches is empty; expected at least one")
    by_example = [per == "example" or (last_layer == "examples" and layer == len(counts) - 1) for layer in range(len(counts))]
    scores = [x / max(1, examples[n] if by_example[n] else tokens[n]) for n, x in enumerate(total)]
    if normalise == "layer_l2":
        scores = [x / (x.square().sum().sqrt() + 1e-20) for x in scores]
    return table_of(scores, "importance")


def removable(order: Sequence[Head], keep: int, counts: Sequence[int]) -> list[Head]:
    """The heads in this order, without those whose removal would leave a layer fewer than `keep`."""
    left, out = list(counts), []
    for layer, head in order:
        if left[layer] > keep:
            left[layer] -= 1
            out.append((layer, head))
    return out
