"""Checks of hyperzzw."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.planes import depthwise, gelu, image, pointwise
from regard.lab.checks.shared.training import accuracy, trained
from regard.lab.verification import check
from regard.nn.images.hyper_kernels import GroupedStandard, RecursiveGate, SlowNet, grid_of
from regard.tasks.images import scenes
from regard.zoo.vision.hyperzzw import (
    HyperChannel,
    HyperInteract,
    HyperZZWLocal,
    SFNEBlock,
    Terminator,
    hyperzzw_global,
    slow_loss,
    terminator_loss,
)


@check("hyperzzw", "values and gradients of the global operator == a sum over columns", below=1e-12, control="the kernel alone times z")
def _() -> tuple[float, float]:
    kernel, x, z = image(1, 3, 4, 5), image(2, 3, 4, 5), image(2, 3, 5, 6)
    truth = torch.zeros(2, 3, 4, 6, dtype=F64)
    for k in range(5):
        truth = truth + (x[..., k] * kernel[..., k])[..., None] * z[:, :, k, None]
    found = hyperzzw_global(kernel, x, z)
    other = naive.gap(kernel @ z, found)
    return gap_with_gradients(found, truth, (kernel, x, z)), other


@check("hyperzzw", "G(3x, 3z) off 9 G(x, z): its kernel is its input's", below=1e-12, control="the kernel alone times z")
def _() -> tuple[float, float]:
    kernel, x, z = torch.randn(3, 4, 4, dtype=F64), torch.randn(2, 3, 4, 4, dtype=F64), torch.randn(2, 3, 4, 4, dtype=F64)
    return naive.gap(hyperzzw_global(kernel, 3 * x, 3 * z), 9 * hyperzzw_global(kernel, x, z)), naive.gap(kernel @ (3 * z), 9 * kernel @ z)


@check("hyperzzw", "pixels that an output of two operators, z = x, does not depend on", below=0.0, control="one operator")
def _() -> tuple[float, float]:
    kernel, x, z = torch.randn(1, 5, 5, dtype=F64), image(1, 1, 5, 5), image(1, 1, 5, 5)
    by_x, by_z = torch.autograd.grad(hyperzzw_global(kernel, x, z)[0, 0, 1, 3], (x, z))
    rows, columns = torch.zeros(5, 5, dtype=torch.bool), torch.zeros(5, 5, dtype=torch.bool)
    rows[1], columns[:, 3] = True, True
    assert torch.equal(by_x[0, 0] != 0, rows) and torch.equal(by_z[0, 0] != 0, columns)

    def blind(count: int) -> float:
        y = x
        for _ in range(count):
            y = hyperzzw_global(kernel, y, y)
        return float((torch.autograd.grad(y[0, 0, 1, 3], x)[0] == 0).sum())

    return blind(2), blind(1)


def standard(x: Tensor, batch: bool = False) -> Tensor:
    dims = (0, 2, 3) if batch else (2, 3)
    mean = x.mean(dims, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dims, keepdim=True) + 1e-5).sqrt()


def grouped(x: Tensor, groups: int) -> Tensor:
    width = x.shape[1] // groups
    return torch.cat([standard(x[:, g * width : (g + 1) * width], batch=g % 2 == 0) for g in range(groups)], 1)


@check("hyperzzw", "G-IBS of 12 and of 3 groups == by hand; its groups' means", below=1e-6, control="each map for itself")
def _() -> tuple[float, float]:
    x, gaps = 3 * torch.randn(3, 24, 4, 5, dtype=F64) + torch.randn(3, 24, 1, 1, dtype=F64), []
    for groups in (12, 3):
        found = GroupedStandard(24, groups)(x)
        gaps += [naive.gap(found, grouped(x, groups)), float(found.mean((0, 2, 3)).abs().max())]
    return max(gaps), naive.gap(standard(x), found)


def kernel_by_hand(net: SlowNet, coordinates: Tensor, x: Tensor | None = None, place: bool = True) -> Tensor:
    """Coordinate by coordinate."""
    layers: Any = net
    shape = coordinates.shape[1:]
    points = coordinates.flatten(1).T
    bias = layers.place.flatten() if place and layers.place is not None else torch.zeros(len(points), dtype=F64)
    h = torch.stack([torch.sin(layers.filters[0].weight @ c + layers.filters[0].bias) for c in points])
    if x is not None:
        k = shape[0]
        cells = [
            x[:, :, x.shape[2] * i // k : -(-x.shape[2] * (i + 1) // k), x.shape[3] * j // k : -(-x.shape[3] * (j + 1) // k)].mean((2, 3))
            for i in range(k)
            for j in range(k)
        ]
        told = [(cell @ layers.reduce.weight.T + layers.reduce.bias).mean(0) for cell in cells]
        told = [gelu(layers.fc.weight @ u + layers.fc.bias) for u in told]
    for at, linear in enumerate(layers.linears):
        wave = layers.filters[at + 1]
        h = torch.stack(
            [
                torch.sin(wave.weight @ c + wave.bias) * (linear.weight @ y + linear.bias) + b
                for c, y, b in zip(points, h, bias, strict=True)
            ]
        )
        if x is not None:
            size = h.square().sum(0).sqrt()
            h = layers.kept[at] * h.detach() + layers.unit[at] * h / size
            h = h * torch.stack([layers.fast[at].weight @ u + layers.fast[at].bias for u in told])
    return torch.stack([layers.last.weight @ y + layers.last.bias for y in h], -1).unflatten(-1, shape)


@check(
    "hyperzzw",
    "kernels of slow nets of one and two dimensions, and of one that hears a map, values and gradients == by hand",
    below=1e-10,
    control="without the bias map",
)
def _() -> tuple[float, float]:
    gaps = []
    for shape, layers in (((7,), 1), ((3, 4), 3)):
        net = drawn(SlowNet(2, shape, 5, layers, omega=1.0))
        c = grid_of(shape, net.last.weight)
        gaps.append(gap_with_gradients(net(), kernel_by_hand(net, c), tuple(net.parameters())))
    x, told = image(2, 3, 7, 8), drawn(SlowNet(3, (3, 3), 5, 2, omega=1.0, context=3))
    c = grid_of((3, 3), told.last.weight)
    gaps.append(gap_with_gradients(told(x=x), kernel_by_hand(told, c, x), (x, *told.parameters())))
    return max(gaps), naive.gap(told(x=x), kernel_by_hand(told, c, x, place=False))


@check(
    "hyperzzw",
    "a kernel asked for at 9 x 9 places, off itself at the 5 x 5 it shares, no bias map",
    below=1e-12,
    control="between the shared ones",
)
def _() -> tuple[float, float]:
    net = drawn(SlowNet(2, (5, 5), 6, 2, place=False))
    fine, coarse = net(grid_of((9, 9), net.last.weight)), net()
    mapped = drawn(SlowNet(2, (5, 5), 6, 2, omega=1.0))
    assert naive.gap(mapped(grid_of((9, 9), net.last.weight))[:, ::2, ::2], mapped()) < 1e-12
    return naive.gap(fine[:, ::2, ::2], coarse), naive.gap(fine[:, 1::2, 1::2], coarse[:, :4, :4])


def recursive(x: Tensor, gate: RecursiveGate) -> Tensor:
    k, v, q, y = ((layer.weight, layer.bias) for layer in (gate.k, gate.v, gate.q, gate.y))
    inner = pointwise(x, *k) * pointwise(pointwise(x, *v), *q)
    return pointwise(gelu(standard(inner)) + gate.place, *y)


def channel_score(x: Tensor, gate: HyperChannel) -> Tensor:
    y = x.mean((2, 3))
    return (y * kernel_by_hand(gate.net, grid_of(gate.net.shape, y))[0] * y)[..., None, None]


def interaction(y: Tensor, x: Tensor, layer: HyperInteract) -> Tensor:
    pixels = y.mean(1, keepdim=True)
    w = kernel_by_hand(layer.over_pixels, grid_of(layer.over_pixels.shape, y))
    return x / (1 + torch.exp(-pixels * w * pixels * channel_score(y, layer.over_channels)))


def local(x1: Tensor, x2: Tensor, layer: HyperZZWLocal) -> Tensor:
    kernel = kernel_by_hand(layer.net, grid_of(layer.net.shape, x1), x1)
    y = pointwise(depthwise(x2, kernel[:, None]), layer.mix.weight, layer.mix.bias)
    return gelu(standard(y, batch=True)) + layer.bias


def block(layer: SFNEBlock, x: Tensor, earlier: tuple[Tensor, ...], residual: bool = False) -> tuple[Tensor, Tensor]:
    layers: Any = layer
    kernel = kernel_by_hand(layer.net, grid_of(layer.net.shape, x))
    hyper = x * kernel
    fast = standard(recursive(hyper, layer.slow) + recursive(x, layer.fast))
    mixed = standard(pointwise(x, layer.mix.weight, layer.mix.bias))
    gated = standard(x / (1 + torch.exp(-channel_score(x, layer.gate))))
    out, out_mixed, out_gated = (torch.einsum("bchk,bckw->bchw", hyper, z) for z in (fast, mixed, gated))
    one, two = local(x, gated, layers.locals[0]), local(gated, x, layers.locals[1])
    three, four = local(mixed, x, layers.locals[2]), local(x, mixed, layers.locals[3])
    wide = [torch.cat([y] * (x.shape[1] // y.shape[1]), 1) for y in earlier]
    maps = [out, two, *wide[:1], fast, out_mixed, one, out / (1 + torch.exp(-out)), three, out_gated, four, *wide[1:]]
    maps.append(interaction(out, x, layer.interact))
    y = pointwise(torch.cat(maps, 1), layer.bottleneck.weight, layer.bottleneck.bias)
    y = gelu(grouped(y, layer.norm.groups)) + layer.after
    return (y + x.repeat(1, y.shape[1] // x.shape[1], 1, 1) if residual else y), kernel


SMALL: dict[str, Any] = {"kernels": (3, 1, 5, 3), "hidden": (3, 4, 3, 2, 3), "groups": 2, "omega": 1.0}


@check(
    "hyperzzw",
    "values and gradients of blocks with no, one and two earlier maps, and of the interaction with itself == by hand",
    below=1e-9,
    control="with a residual addition",
)
def _() -> tuple[float, float]:
    gaps = []
    for count in (0, 1, 2):
        layer = drawn(SFNEBlock(4, 5, 3 if count else 2, count, 1, **SMALL)).eval()
        x, earlier = image(2, 4, 5, 5), tuple(image(2, c, 5, 5) for c in (2, 4)[:count])
        (out, kernel), (truth, its) = layer.with_kernel(x, *earlier), block(layer, x, earlier)
        gaps += [naive.gap(kernel, its), gap_with_gradients(out, truth, (x, *earlier, *layer.parameters()))]
    gaps.append(naive.gap(layer.interact(x), interaction(x, x, layer.interact)))
    return max(gaps), naive.gap(layer(x, *earlier), block(layer, x, earlier, residual=True)[0])


@check(
    "hyperzzw",
    "the net's logits, the slow nets' loss and the whole loss == its blocks wired by hand",
    below=1e-9,
    control="kernels that are not tiled",
)
def _() -> tuple[float, float]:
    net = drawn(Terminator(2, 4, 3, (2, 3, 1, 2, 1), (1, 2, 1, 1, 1), **SMALL), 0.2).eval()
    x, blocks, labels = torch.randn(3, 2, 4, 4, dtype=F64), list(net.blocks), torch.tensor([2, 0, 1])
    with torch.no_grad():
        a, w0 = blocks[0].with_kernel(x)  # type: ignore[operator]
        b, w1 = blocks[1].with_kernel(a + net.biases[0])  # type: ignore[operator]
        c, w2 = blocks[2].with_kernel(b + net.biases[1], a)  # type: ignore[operator]
        d, w3 = blocks[3].with_kernel(c + net.biases[2], b)  # type: ignore[operator]
        e, w4 = blocks[4].with_kernel(d + net.biases[3], c, b)  # type: ignore[operator]
        logits = (e.mean((2, 3)) + net.biases[4]) @ net.head.weight.T + net.head.bias
        kernels, told = [w0, w1, w2, w3, w4], 0.0
        for j in range(5):
            for i in range(j + 1, 5):
                for channel in range(len(kernels[i])):
                    told += float((kernels[j][channel % len(kernels[j])] - kernels[i][channel]).square().mean()) / len(kernels[i])
        found, loss = net.with_loss(x)
        logs = logits.log_softmax(-1)
        whole = float(-0.9 * logs[range(3), labels].mean() - 0.1 * logs.mean()) + told
        plain = sum(float((kernels[j].mean() - kernels[i]).square().mean()) for j in range(5) for i in range(j + 1, 5))
        gaps = [naive.gap(found, logits), abs(float(loss) - told), abs(float(terminator_loss(found, labels, loss)) - whole)]
        assert abs(float(slow_loss(kernels, net.factors)) - told) < 1e-12 and naive.gap(net(x), logits) < 1e-12
        return max(gaps), abs(float(loss) - plain)


@check("hyperzzw", "the net on sequences, off itself on their rows one below the other", below=0.0, control="on columns side by side")
def _() -> tuple[float, float]:
    net, x = drawn(Terminator(2, 4, 3, (2, 3, 1, 2, 1), (1, 2, 1, 1, 1), **SMALL), 0.2).eval(), torch.randn(3, 2, 16, dtype=F64)
    with torch.no_grad():
        logits, loss = net.with_loss(x)
        rows = torch.stack([x[..., 4 * i : 4 * i + 4] for i in range(4)], 2)
        truth, its = net.with_loss(rows)
        assert torch.equal(loss, its) and torch.equal(net(x), logits)
        return naive.gap(logits, truth), naive.gap(net(rows.mT), truth)


class OneBlock(nn.Module):
    """A block, the mean over pixels, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.block = SFNEBlock(3, 16, 8, kernels=(3, 9, 5, 7), hidden=(16, 8, 8, 8, 16), dropout=0.0)
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean((2, 3)))  # type: ignore[no-any-return]


@check(
    "hyperzzw",
    "accuracy of telling squares from discs, one block after 100 steps",
    above=0.75,
    control="pixels of every image exchanged in one way",
)
def _() -> tuple[float, float]:
    order = torch.randperm(256, generator=torch.Generator().manual_seed(3))

    def draw(count: int, generator: torch.Generator, mixed: bool = False) -> tuple[Tensor, Tensor]:
        x, (_, kinds) = scenes(count, generator, side=16, most=1)
        return (x.flatten(2)[..., order].view_as(x) if mixed else x), kinds[:, 0]

    net = trained(OneBlock, draw, 100, lr=1e-2, batch=32)
    return accuracy(net, draw, 400), accuracy(net, lambda count, generator: draw(count, generator, True), 400)
