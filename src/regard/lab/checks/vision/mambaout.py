"""Checks of mambaout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import flops, gap_with_gradients
from regard.lab.checks.shared.layers import drawn, silu
from regard.lab.checks.shared.planes import depthwise, gelu, image, layer_norm
from regard.lab.checks.shared.scans import scanned
from regard.lab.checks.shared.training import Draw, accuracy, trained
from regard.lab.verification import check
from regard.tasks.images import scenes
from regard.zoo.vision.mambaout import GatedCNNBlock, MambaOut, block_flops, is_long_sequence


def block_by_hand(x: Tensor, block: GatedCNNBlock, act: bool = True) -> Tensor:
    hidden, kept, mixed = block.parts
    u = layer_norm(x, block.norm, 1e-6) @ block.first.weight.T + block.first.bias
    g, i, v = u[..., :hidden], u[..., hidden : hidden + kept], u[..., hidden + kept :]
    assert v.shape[-1] == mixed
    v = depthwise(v.movedim(-1, 1), block.conv.weight, block.conv.bias)
    if block.scan is not None:
        v = scanned(silu(v).flatten(2)[:, None], block.scan)[:, 0].view_as(v)
    wide = torch.cat((i, v.movedim(1, -1)), -1)
    return x + ((gelu(g) if act else g) * wide) @ block.last.weight.T + block.last.bias


@check(
    "mambaout",
    "values and gradients of the block: all and half of the channels convolved, of other widths, with the state space == by hand",
    below=1e-10,
    control="no GELU of the gate",
)
def _() -> tuple[float, float]:
    gaps, x = [], image(2, 5, 4, 6)
    for options in ({}, {"conv_ratio": 0.5, "kernel": 3, "ratio": 1.5}, {"ssm": True, "state": 3}):
        block = drawn(GatedCNNBlock(6, **options))
        gaps.append(gap_with_gradients(block(x), block_by_hand(x, block), (x, *block.parameters())))
    assert block.parts == [16, 10, 6]
    return max(gaps), naive.gap(block(x), block_by_hand(x, block, act=False))


@check("mambaout", "the net == by hand, odd sizes", below=1e-10, control="the head without its norm")
def _() -> tuple[float, float]:
    net, x = drawn(MambaOut((4, 6), (1, 2), channels=2, classes=3)), image(2, 2, 21, 26)

    def by_hand(normed: bool) -> Tensor:
        y = x.movedim(1, -1)
        stem, first, down, *blocks = net.layers
        for layer in (stem, down):
            if layer is down:
                y = block_by_hand(y, first)  # type: ignore[arg-type]
            for at, (conv, norm) in enumerate(zip(layer.convs, layer.norms, strict=True)):  # type: ignore[arg-type]
                y = F.conv2d((gelu(y) if at else y).movedim(-1, 1), conv.weight, conv.bias, 2, 1).movedim(1, -1)
                y = layer_norm(y, norm, 1e-6)
        for block in blocks:
            y = block_by_hand(y, block)  # type: ignore[arg-type]
        y = layer_norm(y.mean((1, 2)), net.norm, 1e-6)
        up, _, last_norm, _, out = net.head
        y = gelu(y @ up.weight.T + up.bias)  # type: ignore[operator]
        return (layer_norm(y, last_norm, 1e-6) if normed else y) @ out.weight.T + out.bias  # type: ignore[operator]

    return naive.gap(net(x), by_hand(True)), naive.gap(net(x), by_hand(False))


@check(
    "mambaout",
    "the state space with B = 0 and D = 1, off silu of the convolution",
    below=1e-12,
    control="off the convolution, which MambaOut leaves alone",
)
def _() -> tuple[float, float]:
    block, x = drawn(GatedCNNBlock(6, ssm=True)), image(2, 5, 4, 6)
    assert block.scan is not None
    rank, n = block.scan.sizes[:2]
    with torch.no_grad():
        block.scan.read[:, rank : rank + n] = 0
        block.scan.skip.fill_(1)
    conv = block.conv(x.movedim(-1, 1)).movedim(1, -1)
    return naive.gap(block.mix(x), silu(conv)), naive.gap(block.mix(x), conv)


@check("mambaout", "pixels that one reads through two blocks, over (6 n + 1)^2", below=1.0, control="with the state space")
def _() -> tuple[float, float]:
    def read(ssm: bool) -> float:
        blocks, x = nn.Sequential(*[drawn(GatedCNNBlock(4, ssm=ssm)) for _ in range(2)]), image(1, 21, 21, 4)
        seen = torch.autograd.grad(blocks(x)[0, 10, 10].sum(), x)[0].abs().amax(-1)[0] > 0
        assert bool(seen[4:17, 4:17].all())
        return float(seen.sum()) / 13**2

    return read(False), read(True)


@check(
    "mambaout",
    "operations of a transformer block, counted, over 24 D^2 L + 4 D L^2, off one; the two parts equal at L = 6 D",
    below=0.0,
    control="without the quadratic part",
)
def _() -> tuple[float, float]:
    d, length = 8, 20
    q, k, v, o, up = (torch.randn(d, e) for e in (d, d, d, d, 4 * d))
    x = torch.randn(length, d)

    def block() -> Tensor:
        y = ((x @ q) @ (x @ k).T) @ (x @ v) @ o
        return (y @ up) @ torch.randn(4 * d, d)

    count = flops(block)
    linear, quadratic = block_flops(length, d)
    at = block_flops(6 * d, d)
    sides = [is_long_sequence(6 * d, d), not is_long_sequence(6 * d + 1, d), is_long_sequence(196, 384), not is_long_sequence(4000, 384)]
    return abs(count / (linear + quadratic) - 1) + abs(at[0] - at[1]) + sum(sides), abs(count / linear - 1)


class Mixed(nn.Module):
    """Maps (B, channels, H, W) -> logits: patches, blocks, and the mean over pixels or, read="last", the last one."""

    def __init__(self, channels: int, classes: int, dim: int, depth: int, patch: int, read: str, **options: Any):
        super().__init__()
        self.patches, self.read = nn.Conv2d(channels, dim, patch, patch), read
        self.blocks = nn.Sequential(*[GatedCNNBlock(dim, ratio=2, **options) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(self.patches(x).movedim(1, -1))
        return self.head(self.norm(y[:, -1, -1] if self.read == "last" else y.mean((1, 2))))  # type: ignore[no-any-return]


def whole_images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A square or a disc on 16 x 16 pixels."""
    x, (_, kinds) = scenes(count, generator, side=16, most=1)
    return x, kinds[:, 0]


def first_tokens(count: int, generator: torch.Generator, length: int = 32) -> tuple[Tensor, Tensor]:
    """One of four symbols, and 31 others of four more: (count, 8, 1, 32), and which the first is."""
    tokens = torch.randint(4, 8, (count, length), generator=generator)
    tokens[:, 0] -= 4
    return F.one_hot(tokens, 8).float().mT[:, :, None], tokens[:, 0]


@check(
    "mambaout",
    "accuracy that a state space adds, two blocks with one and without trained alike for 200 steps: squares from discs, 64 patches seen whole",
    below=0.2,
    control="the first of 32 tokens told at the last, three blocks, 300 steps, where convolutions read 9 back",
)
def _() -> tuple[float, float]:
    def gain(make: Callable[[bool], nn.Module], draw: Draw, steps: int, batch: int) -> float:
        without, with_one = (
            accuracy(trained(functools.partial(make, ssm), draw, steps, lr=1e-2, batch=batch), draw) for ssm in (False, True)
        )
        assert without > 0.75 or draw is first_tokens
        return with_one - without

    image = gain(lambda ssm: Mixed(3, 2, 16, 2, 2, "mean", ssm=ssm, state=4), whole_images, 200, 32)
    return image, gain(lambda ssm: Mixed(8, 4, 24, 3, 1, "last", ssm=ssm, state=8), first_tokens, 300, 64)
