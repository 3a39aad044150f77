"""HyperZ.Z.W: kernels drawn by slow nets, multiplied by what they are applied to (id 161; Zhang, 2024).

global: G(x, z) = (x W) z, W (C, H, W) of a slow net, times x pixel by pixel, then a matrix product of maps a channel (square maps)
z: fast = IS(RGU(x W) + RGU'(x)); m = IS(conv_1x1 x); c = IS(x sigmoid((y w) y)), y = mean over pixels.  IS: each map less its mean, over its deviation
local: gelu(BS(conv_1x1(dwconv(x_2; kernel drawn from x_1)))) + bias;  interaction: x sigmoid(s_c s_p), s the same double products of G's means
block: G of the three, silu-like G sigmoid(G), four local maps, fast, interaction (and maps of earlier blocks): conv_1x1, G-IBS, GELU, dropout; no residual
slow loss: sum over blocks i > j of mean (tile(W_j) - W_i)^2
alpha and beta of the renormalisation are trained here; the released code leaves them out of its parameters.
Sequences: of side^2 values, folded row by row. Not built: kernels of one dimension for them, for G multiplies rows by columns, which a sequence has not,
and the released code has maps alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.hyper_kernels import GroupedStandard, RecursiveGate, SlowNet, standardised
from regard.nn.parts import takes


def hyperzzw_global(kernel: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """(x kernel) z: kernel (C, H, W) or (1, C, H, W), x (B, C, H, W), z (B, C, W, V) -> (B, C, H, V)."""
    if z.dim() != 4 or x.shape[-1] != z.shape[-2] or x.shape[:2] != z.shape[:2]:
        raise RegardError(
            f"x {tuple(x.shape)}, z {tuple(z.shape)}; expected (B, C, H, W) and (B, C, W, any): the product of two maps a channel"
        )
    return (x * kernel) @ z


def mixer(inner: int, outer: int) -> nn.Conv2d:
    """1 x 1, weights N(0, 2 / inner), biases 0."""
    layer = nn.Conv2d(inner, outer, 1)
    nn.init.kaiming_normal_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class HyperZZWLocal(nn.Module):
    """x_1, x_2 (B, C, H, W) -> the same shape: x_2 convolved, a channel at a time, with a k x k kernel that depends on x_1; k odd."""

    def __init__(self, channels: int, kernel: int, hidden: int = 32, layers: int = 2, omega: float = 2000.0):
        super().__init__()
        if kernel % 2 == 0:
            raise RegardError(f"kernel={kernel}; expected an odd number")
        self.channels = channels
        self.net = SlowNet(channels, (kernel, kernel), hidden, layers, omega, context=channels)
        self.mix, self.bias = mixer(channels, channels), nn.Parameter(torch.zeros(1))

    @takes(x1="batch channels height width", x2="batch channels height width")
    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        kernel = self.net(x=x1)
        y = F.conv2d(x2, kernel[:, None], padding=kernel.shape[-1] // 2, groups=self.channels)
        return F.gelu(standardised(self.mix(y), batch=True)) + self.bias


class HyperChannel(nn.Module):
    """(y w) y of the means y over pixels, w (C) of a slow net: (B, C, 1, 1)."""

    def __init__(self, channels: int, hidden: int = 32, layers: int = 2, omega: float = 2000.0):
        super().__init__()
        self.net = SlowNet(1, (channels,), hidden, layers, omega)

    def forward(self, x: Tensor) -> Tensor:
        y = x.mean((2, 3), keepdim=True)
        return y * self.net()[0, :, None, None] * y


class HyperInteract(nn.Module):
    """y, x (B, C, side, side) -> x sigmoid(s_c s_p): s_c = (m w) m of y's means m over pixels, s_p the same of its means over channels."""

    def __init__(self, channels: int, side: int, hidden: int = 16, hidden_pixels: int = 64, layers: int = 2, omega: float = 2000.0):
        super().__init__()
        self.over_channels = HyperChannel(channels, hidden, layers, omega)
        self.over_pixels = SlowNet(1, (side, side), hidden_pixels, layers, omega)

    def forward(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        pixels = y.mean(1, keepdim=True)
        score = pixels * self.over_pixels() * pixels * self.over_channels(y)
        return (y if x is None else x) * torch.sigmoid(score)


@register("hyperzzw", kind="module")
class SFNEBlock(nn.Module):
    """x (B, C, side, side) and maps of earlier blocks, whose channels divide C -> (B, factor C, side, side). The maps of a batch depend on one another, in
    evaluation too: kernels and half the standardisations are of the batch. earlier: how many such maps there are, 0 to 2.

    kernels: of the four local branches. hidden: of the slow nets of the global kernel, local kernels, the channel gate and the two of the interaction.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        factor: int = 2,
        earlier: int = 0,
        layers: int = 2,
        kernels: Sequence[int] = (3, 9, 5, 7),
        hidden: Sequence[int] = (64, 32, 32, 16, 64),
        groups: int = 12,
        omega: float = 2000.0,
        dropout: float = 0.05,
    ):
        super().__init__()
        if len(kernels) != 4 or len(hidden) != 5 or not 0 <= earlier <= 2:
            raise RegardError(f"kernels={tuple(kernels)}, hidden={tuple(hidden)}, earlier={earlier}; expected four, five, and 0 to 2")
        self.channels, self.side, self.earlier = channels, side, earlier
        self.net = SlowNet(channels, (side, side), hidden[0], layers, omega)
        self.locals = nn.ModuleList(HyperZZWLocal(channels, k, hidden[1], 2, omega) for k in kernels)
        self.mix = mixer(channels, channels)
        self.slow, self.fast = RecursiveGate(channels, side), RecursiveGate(channels, side)
        self.gate = HyperChannel(channels, hidden[2], 2, omega)
        self.interact = HyperInteract(channels, side, hidden[3], hidden[4], 2, omega)
        self.bottleneck = mixer(channels * (10 + earlier), channels * factor)
        self.norm, self.drop, self.after = GroupedStandard(channels * factor, groups), nn.Dropout2d(dropout), nn.Parameter(torch.zeros(1))

    @takes(x="batch channels side side")
    def with_kernel(self, x: Tensor, *earlier: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the global kernel (C, side, side)."""
        if len(earlier) != self.earlier or any(self.channels % y.shape[1] for y in earlier):
            raise RegardError(
                f"{len(earlier)} earlier maps of {[y.shape[1] for y in earlier]} channels; expected {self.earlier}, dividing {self.channels}"
            )
        kernel = self.net()
        fast = standardised(self.slow(x * kernel) + self.fast(x))
        mixed, gated = standardised(self.mix(x)), standardised(x * torch.sigmoid(self.gate(x)))
        out, out_mixed, out_gated = (hyperzzw_global(kernel, x, z) for z in (fast, mixed, gated))
        pairs = ((x, gated), (gated, x), (mixed, x), (x, mixed))
        one, two, three, four = (layer(*pair) for layer, pair in zip(self.locals, pairs, strict=True))
        tiled = [y.repeat(1, self.channels // y.shape[1], 1, 1) for y in earlier]
        maps = [
            out,
            two,
            *tiled[:1],
            fast,
            out_mixed,
            one,
            out * torch.sigmoid(out),
            three,
            out_gated,
            four,
            *tiled[1:],
            self.interact(out, x),
        ]
        return self.drop(F.gelu(self.norm(self.bottleneck(torch.cat(maps, 1)))) + self.after), kernel

    def forward(self, x: Tensor, *earlier: Tensor) -> Tensor:
        return self.with_kernel(x, *earlier)[0]


def slow_loss(kernels: Sequence[Tensor], factors: Sequence[int]) -> Tensor:
    """sum over i > j of mean((tile(W_j) - W_i)^2): kernels of the blocks, each with `factors` of the one before as many channels."""
    total = torch.zeros((), dtype=kernels[0].dtype, device=kernels[0].device)
    for j, i in itertools.combinations(range(len(kernels)), 2):
        total = total + (kernels[j].repeat(math.prod(factors[j:i]), 1, 1) - kernels[i]).square().mean()
    return total


class Terminator(nn.Module):
    """Images (B, channels, side, side), or sequences (B, channels, side^2), which are folded row by row -> logits (B, classes); `with_loss(x)`: these and
    the slow nets' loss. Five blocks; the third, fourth and fifth also take what the first, the second, and the third and second gave."""

    def __init__(
        self,
        channels: int = 3,
        side: int = 32,
        classes: int = 10,
        factors: Sequence[int] = (4, 3, 2, 2, 2),
        layers: Sequence[int] = (3, 2, 2, 2, 2),
        dropouts: Sequence[float] = (0.0, 0.05, 0.05, 0.05, 0.05),
        **options: object,
    ):
        super().__init__()
        if not len(factors) == len(layers) == len(dropouts) == 5:
            raise RegardError("factors, layers and dropouts; expected 5 of each, a number a block")
        self.channels, self.side, self.factors, self.blocks = channels, side, tuple(factors), nn.ModuleList()
        for at, earlier in enumerate((0, 0, 1, 1, 2)):
            width = channels * math.prod(factors[:at])
            self.blocks.append(SFNEBlock(width, side, factors[at], earlier, layers[at], dropout=dropouts[at], **options))  # type: ignore[arg-type]
        self.biases, self.head = nn.Parameter(torch.zeros(5)), nn.Linear(channels * math.prod(factors), classes)
        nn.init.kaiming_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def with_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(x, Tensor) and x.dim() == 3 and x.shape[2] == self.side**2:
            x = x.unflatten(2, (self.side, self.side))
        return self.of_maps(x)

    @takes(x="batch channels side side")
    def of_maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outs: list[Tensor] = []
        kernels: list[Tensor] = []
        for at, (block, reads) in enumerate(zip(self.blocks, ((), (), (0,), (1,), (2, 1)), strict=True)):
            x, kernel = block.with_kernel(x if at == 0 else x + self.biases[at - 1], *[outs[n] for n in reads])  # type: ignore[operator]
            outs.append(x)
            kernels.append(kernel)
        return self.head(x.mean((2, 3)) + self.biases[4]), slow_loss(kernels, self.factors)

    def forward(self, x: Tensor) -> Tensor:
        return self.with_loss(x)[0]


def terminator_loss(logits: Tensor, labels: Tensor, slow: Tensor, smoothing: float = 0.1) -> Tensor:
    """Cross entropy with smoothed labels, plus the slow nets' loss."""
    return F.cross_entropy(logits, labels, label_smoothing=smoothing) + slow
