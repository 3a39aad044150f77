"""What rounding weights and activations costs a trained model: outliers, which sinks bring, make it dear."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegardError


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Round to the nearest of 2^bits - 1 symmetric levels, a scale for each output channel: w (out, in)."""
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / top
    return (weight / scale).round().clamp(-top, top) * scale


def quantised(model: nn.Module, bits: int) -> nn.Module:
    """A copy of a model whose linear layers have weights of `bits` bits (2 to 16), rounded after training."""
    check_bits(bits)
    smaller = copy.deepcopy(model)
    with torch.no_grad():
        for module in smaller.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(rounded(module.weight, bits))
    return smaller


class RoundedInput(nn.Module):
    """A linear layer whose input is rounded to one of 2^bits levels between `low` and `high`, fixed numbers for the whole tensor (asymmetric, static);
    values beyond them are cut off."""

    low: Tensor
    high: Tensor

    def __init__(self, linear: nn.Linear, bits: int):
        super().__init__()
        self.linear, self.bits = linear, bits
        for name in ("low", "high"):
            self.register_buffer(name, torch.zeros((), device=linear.weight.device))

    def watch(self, x: Tensor, momentum: float | None) -> None:
        """Widen the range to what x holds, or (momentum) move it there by an average."""
        found = torch.stack((x.min().clamp_max(0), x.max().clamp_min(0))).detach().float()
        old = torch.stack((self.low, self.high))
        fresh = bool((old == 0).all())
        if momentum is None:
            new = torch.stack((torch.minimum(old[0], found[0]), torch.maximum(old[1], found[1])))
        else:
            new = found if fresh else momentum * old + (1 - momentum) * found
        self.low.copy_(new[0])
        self.high.copy_(new[1])

    def forward(self, x: Tensor) -> Tensor:
        step = ((self.high - self.low) / (2**self.bits - 1)).clamp_min(1e-12).to(x.dtype)
        zero = (-self.low.to(x.dtype) / step).round()
        level = (x / step + zero).round().clamp(0, 2**self.bits - 1)
        return self.linear((level - zero) * step)  # type: ignore[no-any-return]


@torch.no_grad()
def quantised_throughout(
    model: nn.Module,
    batches: Iterable[Any],
    bits: int = 8,
    activation_bits: int = 8,
    momentum: float | None = 0.9,
    run: Callable[[nn.Module, Any], Any] | None = None,
) -> nn.Module:
    """A copy of a model with weights and inputs of its linear layers rounded ("W8A8"): weights to `bits` symmetric levels, activations to
    `activation_bits`, between limits found on `batches`: by an average of each batch's least and largest value, or (momentum None) the
    least and largest of all. run(model, batch) runs it (None: model(batch)). RegardError: no batches, or no linear layer that they reach."""
    check_bits(activation_bits)
    smaller = quantised(model, bits)
    linears = [(name, part) for name, part in smaller.named_modules() if isinstance(part, nn.Linear)]
    rounding = {name: RoundedInput(part, activation_bits) for name, part in linears}
    reached: set[str] = set()
    handles = []
    for name, part in linears:

        def hook(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            reached.add(name)
            rounding[name].watch(args[0], momentum)

        handles.append(part.register_forward_pre_hook(hook))
    seen = 0
    try:
        for batch in batches:
            seen += 1
            (smaller if run is None else run)(*((batch,) if run is None else (smaller, batch)))
    finally:
        for handle in handles:
            handle.remove()
    if not reached:
        raise RegardError(f"{seen} batches reached no linear layer; expected at least one batch, and a model with linear layers")
    if "" in reached:  # the model is itself a linear layer
        return rounding[""]
    for name in reached:
        parent, _, key = name.rpartition(".")
        setattr(smaller.get_submodule(parent), key, rounding[name])
    return smaller


def check_bits(bits: int) -> None:
    if not 2 <= bits <= 16:
        raise RegardError(f"bits={bits}; expected 2 to 16")
