"""lambda-ViT: attention layers that carry little information are faded out, and their blocks go on as MLPs (id 288; Lin et al., 2024).

entropy of features: sum_j log std_j over samples;  transfer entropy of a layer: |H(out) - H(out | its attention is zero)|
diluted block: x <- (2 - lam) x + lam attn(LN x), x <- x + MLP(LN x);  lam = max(0, 1 - epoch / 299);  lam = 0: x <- 2 x + MLP(LN(2 x))
NOSE: add, one at a time, the layer whose removal together with those chosen changes the last entropy least
Not reproduced on the ViT on digits that comes with regard: of three layers that NOSE takes one is layer 0,
whose silence costs the most (67% right become 52%); the first that it takes costs 1%.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.vit_host import attention, host_of


@register("lambda-vit", kind="function")
def dilute(vit: nn.Module, layers: Sequence[int]) -> DilutedViT:
    """The attention of these layers of a timm ViT under one lam, which starts at 1. The model is changed in place; `strip` ends it."""
    host, count = host_of(vit), len(host_of(vit).blocks)
    if len(set(layers)) < len(layers) or any(not 0 <= layer < count for layer in layers) or not layers:
        raise RegardError(f"layers={list(layers)}; expected some of 0..{count - 1}, each once")
    if any(not hasattr(host.blocks[layer], "attn") or isinstance(host.blocks[layer], DilutedBlock) for layer in layers):
        raise RegardError(f"layers={list(layers)}; expected layers that are neither diluted nor stripped")
    for layer in layers:
        host.blocks[layer] = DilutedBlock(host.blocks[layer])
    return DilutedViT(host, tuple(layers))


class DilutedBlock(nn.Module):
    """A block x (B, N, dim) -> the same shape whose attention counts lam."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self.lam = block, 1.0

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self.block
        if self.lam == 0:
            x = 2 * x
        else:
            x = (2 - self.lam) * x + self.lam * block.drop_path1(block.ls1(attention(block.attn, block.norm1(x))))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))  # type: ignore[no-any-return]


class MLPBlock(nn.Module):
    """What is left of a diluted block: x <- 2 x, x + MLP(LN x)."""

    def __init__(self, block: Any):
        super().__init__()
        self.norm2, self.mlp, self.ls2, self.drop_path2 = block.norm2, block.mlp, block.ls2, block.drop_path2

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))  # type: ignore[no-any-return]


class DilutedViT:
    """A model some of whose layers are diluted. `lam` sets all of them; `at(epoch)` follows the schedule; `strip()` deletes their attention."""

    def __init__(self, vit: Any, layers: tuple[int, ...]):
        self.vit, self.layers = vit, layers

    @property
    def lam(self) -> float:
        return self.vit.blocks[self.layers[0]].lam  # type: ignore[no-any-return]

    @lam.setter
    def lam(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise RegardError(f"lam={value}; expected between 0 and 1")
        for layer in self.layers:
            self.vit.blocks[layer].lam = value

    def at(self, epoch: float, last: float = 299.0) -> float:
        """lam = max(0, 1 - epoch / last)."""
        self.lam = max(0.0, min(1.0, 1 - epoch / last))
        return self.lam

    def strip(self) -> nn.Module:
        """The model without the attention, and its norm, of these layers; what it says at lam = 0."""
        if self.lam != 0:
            raise RegardError(f"lam={self.lam}; expected 0, where the attention is no longer read")
        for layer in self.layers:
            self.vit.blocks[layer] = MLPBlock(self.vit.blocks[layer].block)
        return self.vit  # type: ignore[no-any-return]


def layer_entropy(features: Tensor, eps: float = 0.0) -> Tensor:
    """sum_j log(std_j + eps) of features (..., dim), over all but the last dimension: a Gaussian's entropy but for constants."""
    flat = features.flatten(0, -2)
    if len(flat) < 2:
        raise RegardError(f"features {tuple(features.shape)} have {len(flat)} samples; expected two or more")
    return torch.log(flat.std(0, correction=0) + eps).sum()


class Silent(nn.Module):
    """Zeros in place of an attention's output."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(x)


@contextmanager
def silenced(vit: Any, layers: Iterable[int]) -> Iterator[None]:
    """The attention of these layers gives zeros inside `with`."""
    kept = {layer: vit.blocks[layer].attn for layer in layers}
    try:
        for layer in kept:
            vit.blocks[layer].attn = Silent()
        yield
    finally:
        for layer, attn in kept.items():
            vit.blocks[layer].attn = attn


@torch.no_grad()
def entropy_without(vit: nn.Module, images: Tensor, layers: Sequence[int], batch: int = 64) -> float:
    """Entropy of the last block's normed tokens where these layers' attention is zero; the model in evaluation mode."""
    host, training = host_of(vit), vit.training
    vit.eval()
    try:
        with silenced(host, layers):
            found = torch.cat([host.forward_features(part) for part in images.split(batch)])
    finally:
        vit.train(training)
    return float(layer_entropy(found.double()))


def transfer_entropy(vit: nn.Module, images: Tensor, layers: Sequence[int]) -> float:
    """|H(out) - H(out | attention of these layers is zero)|, of images (B, C, H, W)."""
    return abs(entropy_without(vit, images, ()) - entropy_without(vit, images, layers))


def select_layers(vit: nn.Module, images: Tensor, count: int) -> list[int]:
    """`count` layers, in the order in which NOSE takes them."""
    depth = len(host_of(vit).blocks)
    if not 1 <= count <= depth:
        raise RegardError(f"count={count}; expected between 1 and {depth}")
    whole, chosen = entropy_without(vit, images, ()), list[int]()
    for _ in range(count):
        left = [layer for layer in range(depth) if layer not in chosen]
        chosen.append(min(left, key=lambda layer: abs(whole - entropy_without(vit, images, [*chosen, layer]))))
    return chosen
