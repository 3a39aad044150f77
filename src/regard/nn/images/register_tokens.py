"""Register tokens at test time: what the units that make outliers say goes to empty tokens at the end (Jiang et al., 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RegardError

PATCHES = ("zero", "mean", "outliers", "same")


def sign_max(x: Tensor) -> Tensor:
    """The entry of largest size over the tokens, with its sign; the lower of equal sizes: (B, N, n) -> (B, 1, n)."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    return torch.where(high.abs() > low.abs(), high, low)


@dataclass(frozen=True)
class Registers:
    """What becomes of the activations of `neurons`, {layer: units}: see `TestTimeRegisters`. scale: one number, or one a register. prefix: first tokens,
    which are left alone."""

    neurons: Mapping[int, Sequence[int]]
    count: int = 1
    scale: float | Sequence[float] = 1.0
    patches: str = "zero"
    shared: bool = False
    place: int | None = None
    prefix: int = 1

    def fit(self, widths: Sequence[int]) -> None:
        """RegardError, unless a model whose layers' MLPs are as wide as this has these units."""
        if self.patches not in PATCHES or self.count < 0 or (self.place is not None and self.count):
            raise RegardError(
                f"patches={self.patches!r}, count={self.count}, place={self.place}; expected one of {PATCHES}, and a place with count=0 alone"
            )
        if isinstance(self.scale, Sequence) and len(self.scale) != (self.count or 1):
            raise RegardError(f"scale names {len(self.scale)} registers; expected one number, or one for each of count={self.count}")
        for layer, units in self.neurons.items():
            width = widths[layer] if 0 <= layer < len(widths) else 0
            if not units or not all(0 <= unit < width for unit in units):
                raise RegardError(f"neurons name units {list(units)} of layer {layer}; expected some of its {width}")
        if self.neurons and not self.count and self.place is None:
            raise RegardError("neurons without registers; expected count from 1, or a place")

    def rewritten(self, act: Tensor, units: Sequence[int]) -> Tensor:
        """Activations (B, prefix + N + count, hidden) with those of `units` moved."""
        mine = act[..., list(units)]
        peak = sign_max(mine.flatten(1)[..., None]) if self.shared else sign_max(mine)
        stop = act.shape[1] - self.count
        first, patch = mine[:, : self.prefix], mine[:, self.prefix : stop]
        mean = patch.mean(1, keepdim=True)
        kept = {
            "zero": torch.zeros_like(patch),
            "mean": mean.expand_as(patch),
            "outliers": torch.where(patch > mean + patch.std(1, keepdim=True), mean, patch) if self.patches == "outliers" else patch,
            "same": patch,
        }[self.patches]
        written = (torch.tensor(self.scale, dtype=peak.dtype, device=peak.device).view(-1, 1) * peak).expand(
            -1, self.count or 1, len(units)
        )
        if self.place is not None:
            kept = torch.cat((kept[:, : self.place], written, kept[:, self.place + 1 :]), 1)
        last = written if self.count else written[:, :0]
        return act.index_copy(2, torch.tensor(units, device=act.device), torch.cat((first, kept, last), 1))


def layers_of(tower: nn.Module) -> Any:
    """The blocks of a vision tower of transformers: the first list `layers` inside whose members have an `mlp` with `fc2`."""
    for part in tower.modules():
        layers = getattr(part, "layers", None)
        if (
            isinstance(layers, nn.ModuleList)
            and len(layers)
            and isinstance(getattr(getattr(layers[0], "mlp", None), "fc2", None), nn.Linear)
        ):
            return layers
    raise RegardError(
        f"tower is a {type(tower).__name__} without blocks that have mlp.fc2; expected a vision tower such as CLIP's or SigLIP's"
    )


@contextmanager
def tower_registers(
    tower: nn.Module, neurons: Mapping[int, Sequence[int]], count: int = 1, prefix: int = 1, **options: Any
) -> Iterator[None]:
    """Within `with`, a vision tower of transformers (alone, or `vision_tower` of a vision-language model) runs beside `count` registers, and gives what it
    gave: hidden states and attention without them. neurons, options: as in `TestTimeRegisters`. prefix: class tokens in front (SigLIP: 0).

    Registers come as zeros in front of the first block, behind the norm that CLIP has there. Leaving takes every hook off."""
    layers, registers = layers_of(tower), Registers(neurons, count, prefix=prefix, **options)
    registers.fit([layer.mlp.fc2.in_features for layer in layers])
    length: list[int] = [0]

    def enter(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = args[0] if args else given["hidden_states"]
        length[0] = x.shape[1]
        x = torch.cat((x, x.new_zeros(len(x), count, x.shape[2])), 1)
        return ((x, *args[1:]), given) if args else (args, {**given, "hidden_states": x})

    def without(x: Any) -> Any:
        if isinstance(x, tuple | list):
            return type(x)(without(one) for one in x)
        if not isinstance(x, Tensor):
            return x
        long = length[0] + count
        for dim in (1,) if x.dim() == 3 else (2, 3) if x.dim() == 4 else ():
            x = x.narrow(dim, 0, length[0]) if x.shape[dim] == long else x
        return x

    def leave(module: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return without(out)
        for key, value in list(out.items()):
            out[key] = without(value)
        return out

    def move(units: Sequence[int]) -> Any:
        return lambda module, args: (registers.rewritten(args[0], units),)

    handles = [layers[0].register_forward_pre_hook(enter, with_kwargs=True), tower.register_forward_hook(leave)]
    handles += [layers[layer].mlp.fc2.register_forward_pre_hook(move(units)) for layer, units in neurons.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
