"""Test-time registers: the few neurons that make outlier patches write into an empty token instead (id 267; Jiang et al., 2025).

outliers: patches of norm above a threshold;  score of unit n of layer l: mean over images of mean_{i in outliers} |act_l[i, n]|
intervention in layer l, behind the MLP's activation: act[register, n] = s signmax_i act[i, n], act[patches, n] = 0
Registers start as zeros at the end, take part in attention, and are dropped at the end. No training.
The ViT on digits that comes with regard has no outliers (norms of patches up to 1.3 times the median): there they are planted.
In a vision tower of transformers, alone or in a vision-language model: `tower_registers`. What it does to such a model's answers is not studied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.register_tokens import Registers, tower_registers
from regard.nn.images.vit_host import embedded, host_of, weights_of


def activation_of(block: Any) -> nn.Module:
    act = getattr(block.mlp, "act", None)
    if not isinstance(act, nn.Module):
        raise RegardError(f"the MLP is a {type(block.mlp).__name__} without a module `act`; expected timm's Mlp")
    return act


@register("test-time-registers", kind="module")
class TestTimeRegisters(nn.Module):
    """Images -> what the ViT of timm gives, computed beside `count` registers. neurons: {layer: units of its MLP}, of `find_register_neurons`.

    scale: s, or one a register. patches: what becomes of patches' activations, "zero", their "mean", "outliers" (those above mean + one standard deviation become
    the mean) or "same". shared: one signmax for all units of a layer, as released; False: one a unit. place: write to this patch instead of
    registers (count=0), to show that the place is free. Class tokens are left alone.
    """

    __test__ = False  # no test of pytest's

    def __init__(
        self,
        vit: nn.Module,
        neurons: Mapping[int, Sequence[int]],
        count: int = 1,
        scale: float | Sequence[float] = 1.0,
        patches: str = "zero",
        shared: bool = False,
        place: int | None = None,
    ):
        super().__init__()
        self.vit = host_of(vit)
        self.registers = Registers(neurons, count, scale, patches, shared, place, self.vit.num_prefix_tokens)
        self.registers.fit([block.mlp.fc1.out_features for block in self.vit.blocks])
        self.neurons, self.count, self.place = {layer: list(units) for layer, units in neurons.items()}, count, place
        self.colours, self.prefix = self.vit.patch_embed.proj.in_channels, self.vit.num_prefix_tokens

    @contextmanager
    def intervention(self) -> Iterator[None]:
        def hook(units: list[int]) -> Any:
            return lambda module, inputs, output: self.registers.rewritten(output, units)

        handles = [activation_of(self.vit.blocks[layer]).register_forward_hook(hook(units)) for layer, units in self.neurons.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def all_tokens(self, images: Tensor) -> Tensor:
        """Before the last norm, (B, prefix + N + count, dim), registers last."""
        if images.dim() != 4 or images.shape[1] != self.colours:
            raise RegardError(f"images {tuple(images.shape)}; expected (batch, colours={self.colours}, height, width)")
        x = embedded(self.vit, images)
        if self.place is not None and not 0 <= self.place < x.shape[1] - self.prefix:
            raise RegardError(f"place={self.place}; expected one of the {x.shape[1] - self.prefix} patches")
        x = torch.cat((x, x.new_zeros(len(x), self.count, x.shape[2])), 1)
        with self.intervention():
            for block in self.vit.blocks:
                x = block(x)
        return x

    def forward_features(self, images: Tensor) -> Tensor:
        """Normed, without the registers."""
        x = self.all_tokens(images)
        return self.vit.norm(x[:, : x.shape[1] - self.count])  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor):
            raise RegardError(f"images is {type(images).__name__}; expected a tensor (batch, colours, height, width)")
        return self.vit.forward_head(self.forward_features(images))  # type: ignore[no-any-return]


__all__ = ["TestTimeRegisters", "find_register_neurons", "outlier_metrics", "tower_registers"]


class Seen(NamedTuple):
    """acts: a layer's activations (B, L, hidden) each; norms (layers, B, L): of tokens behind each block."""

    acts: list[Tensor]
    norms: Tensor


@torch.no_grad()
def watched(vit: nn.Module, images: Tensor) -> Seen:
    host, acts, norms = host_of(vit), list[Tensor](), list[Tensor]()
    x = embedded(host, images)
    for block in host.blocks:
        handle = activation_of(block).register_forward_hook(lambda module, inputs, output: acts.append(output))
        try:
            x = block(x)
        finally:
            handle.remove()
        norms.append(x.norm(dim=-1))
    return Seen(acts, torch.stack(norms))


@torch.no_grad()
def find_register_neurons(
    vit: nn.Module,
    images: Tensor,
    threshold: float,
    layer: int = -1,
    top: int = 10,
    last: int | None = None,
    quiet: tuple[float, float] | None = None,
    first_tokens: bool = False,
) -> dict[int, list[int]]:
    """{layer: units}, the `top` units of highest score, in order of it in each layer.

    threshold: norm behind `layer` above which a token is an outlier (for example 150 at the second last of DINOv2-L, 30 at the last of CLIP-B).
    last: the highest layer whose units count (None: all). quiet (level, share): units only that stay below `level` on at least `share` of the
    tokens, as (0.5, 0.5). first_tokens: whether class tokens may be outliers, as in the released code. Images without outliers are left out.
    """
    host, sums, counted = host_of(vit), list[Tensor](), 0
    if top < 1 or not len(images):
        raise RegardError(f"top={top}, {len(images)} images; expected at least 1 of each")
    for image in images.split(1):
        seen = watched(vit, image)
        outliers = seen.norms[layer, 0] > threshold
        if not first_tokens:
            outliers[: host.num_prefix_tokens] = False
        if not outliers.any():
            continue
        scores = [act[0, outliers].abs().mean(0) for act in seen.acts]
        if quiet is not None:
            scores = [score * ((act[0] < quiet[0]).double().mean(0) >= quiet[1]) for score, act in zip(scores, seen.acts, strict=True)]
        sums, counted = (scores if not counted else [a + b for a, b in zip(sums, scores, strict=True)]), counted + 1
    if not counted:
        raise RegardError(f"no token's norm is above threshold={threshold}; expected a lower one, or other images")
    ranked = [(float(value), at, unit) for at, score in enumerate(sums) if last is None or at <= last for unit, value in enumerate(score)]
    found: dict[int, list[int]] = {}
    for _, at, unit in sorted(ranked, key=lambda one: -one[0])[:top]:
        found.setdefault(at, []).append(unit)
    return found


@torch.no_grad()
def outlier_metrics(model: nn.Module, images: Tensor, outliers: Tensor | None = None) -> dict[str, Tensor]:
    """norms (layers,): the largest norm of a patch behind each block over the median one; share (layers,): of the class token's attention on
    `outliers` (B, N) bool. model: a ViT, or `TestTimeRegisters`."""
    wrapped = model if isinstance(model, TestTimeRegisters) else TestTimeRegisters(model, {}, 0)
    vit: Any = wrapped.vit
    x, norms, shares = embedded(vit, images), [], []
    x = torch.cat((x, x.new_zeros(len(x), wrapped.count, x.shape[2])), 1)
    patches = slice(wrapped.prefix, x.shape[1] - wrapped.count)
    with wrapped.intervention():
        for block in vit.blocks:
            p = weights_of(block.attn, block.norm1(x)).mean(1)[:, 0, patches]
            shares.append((p * outliers).sum(1).mean() if outliers is not None else p.new_zeros(()))
            x = block(x)
            size = x[:, patches].norm(dim=-1)
            norms.append((size.amax(1) / size.median(1).values).max())
    return {"norms": torch.stack(norms), "share": torch.stack(shares)}
