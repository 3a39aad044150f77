"""Checks of twins."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.patch_mixers import mlp
from regard.lab.checks.shared.planes import depthwise, image, layer_norm
from regard.lab.checks.shared.token_attention import attended, same_window
from regard.lab.verification import check
from regard.zoo.vision.twins import PEG, GlobalSubsampledAttention, LocallyGroupedAttention, Twins, pair_flops

Shape = tuple[int, int]


def local(layer: LocallyGroupedAttention, x: Tensor, shape: Shape) -> Tensor:
    s = layer.window
    h, w = (n + -n % s for n in shape)
    plane = F.pad(x.unflatten(1, shape), (0, 0, 0, w - shape[1], 0, h - shape[0]))
    out = attended(layer.inner, plane.flatten(1, 2), None, same_window(h, w, s)).unflatten(1, (h, w))
    return out[:, : shape[0], : shape[1]].flatten(1, 2)


def subsampled(layer: GlobalSubsampledAttention, x: Tensor, shape: Shape, normed: bool = True) -> Tensor:
    if layer.reduce is None:
        return attended(layer.inner, x)
    r, weight, plane = layer.reduction, layer.reduce.weight, x.unflatten(1, shape)
    assert layer.reduce.bias is not None
    corners = [(i * r, j * r) for i in range(shape[0] // r) for j in range(shape[1] // r)]
    rows = [torch.einsum("bhwc,ochw->bo", plane[:, i : i + r, j : j + r], weight) + layer.reduce.bias for i, j in corners]
    source = torch.stack(rows, 1)
    return attended(layer.inner, x, layer_norm(source, layer.norm) if normed else source)  # type: ignore[arg-type]


def placed(layer: PEG, x: Tensor, shape: Shape) -> Tensor:
    return x + depthwise(x.mT.unflatten(-1, shape), layer.conv.weight, layer.conv.bias).flatten(2).mT


@check(
    "twins",
    "values and gradients of LSA, GSA (reductions 1, 2 and 3) and PEG on 6 x 6 and 5 x 7 tokens == masks, patches and taps by loops",
    below=1e-11,
    control="GSA without its norm",
)
def _() -> tuple[float, float]:
    gaps, other = [], 0.0
    for shape in ((6, 6), (5, 7)):
        x = image(2, shape[0] * shape[1], 8)
        lsa, peg = drawn(LocallyGroupedAttention(8, 2, 3, qkv_bias=True)), drawn(PEG(8))
        gaps.append(gap_with_gradients(lsa(x, shape), local(lsa, x, shape), (x, *lsa.parameters())))
        gaps.append(gap_with_gradients(peg(x, shape), placed(peg, x, shape), (x, *peg.parameters())))
        for reduction in (1, 2, 3):
            gsa = drawn(GlobalSubsampledAttention(8, 4, reduction))
            gaps.append(gap_with_gradients(gsa(x, shape), subsampled(gsa, x, shape), (x, *gsa.parameters())))
        other = naive.gap(gsa(x, shape), subsampled(gsa, x, shape, normed=False))
    return max(gaps), other


@check(
    "twins",
    "features and logits of two-stage SVT and PCPVT nets of 30 x 22 pixels == by hand: LSA first, GSA second, PEG behind the first block",
    below=1e-10,
    control="PEG before the first block",
)
def _() -> tuple[float, float]:
    x, gaps, other = image(2, 2, 30, 22), [], 0.0
    for windows in ((3, 2), None):
        net = drawn(Twins((4, 8), (2, 3), (1, 2), windows, (2, 1), (2, 3), channels=2, classes=3))

        net.windowed = windows is not None  # type: ignore[assignment]

        def by_hand(net: Any = net, early: bool = False) -> list[Tensor]:
            y, found = x, []
            for at in range(2):
                size = 2 if at else 4
                y = F.conv2d(y, net.patches[at].weight, net.patches[at].bias, size)
                shape = (y.shape[2], y.shape[3])
                y = layer_norm(y.flatten(2).mT, net.norms[at])
                for number, block in enumerate(net.stages[at]):
                    y = placed(net.places[at], y, shape) if early and number == 0 else y
                    h = layer_norm(y, block.norm1, 1e-6)
                    near = isinstance(block.attention, LocallyGroupedAttention)
                    assert near == (net.windowed and number % 2 == 0)
                    y = y + (local if near else subsampled)(block.attention, h, shape)
                    y = y + mlp(layer_norm(y, block.norm2, 1e-6), block.mlp)
                    y = placed(net.places[at], y, shape) if not early and number == 0 else y
                y = y.mT.unflatten(-1, shape)
                found.append(y)
            return [*found, layer_norm(y.flatten(2).mT, net.norm, 1e-6).mean(1) @ net.head.weight.T + net.head.bias]

        truth = by_hand()
        gaps += [naive.gap(a, b) for a, b in zip([*net.features(x), net(x)], truth, strict=True)]
        other = naive.gap(net(x), by_hand(early=True)[-1])
    return max(gaps), other


def reached(layers: list[Any], shape: Shape = (6, 6)) -> Tensor:
    """Which tokens the first one's output reads."""
    x = image(1, shape[0] * shape[1], 8)
    y = x
    for layer in layers:
        y = layer(y, shape)
    return torch.autograd.grad(y[0, 0].sum(), x)[0][0].abs().amax(-1) > 0


@check("twins", "tokens that LSA reads, over a window's; GSA alone and LSA then GSA read all", below=1.0, control="LSA then GSA")
def _() -> tuple[float, float]:
    lsa, gsa = drawn(LocallyGroupedAttention(8, 2, 3)), drawn(GlobalSubsampledAttention(8, 2, 2))
    assert reached([gsa]).all() and reached([lsa])[[0, 1, 2, 6, 7, 8, 12, 13, 14]].all()
    return float(reached([lsa]).sum()) / 9, float(reached([lsa, gsa]).sum()) / 9


@check("twins", "PEG of a moved map, off the moved map of PEG, inner tokens", below=1e-12, control="a learned place for each token")
def _() -> tuple[float, float]:
    peg, x = drawn(PEG(8)), image(2, 48, 8)
    table = torch.randn(48, 8, dtype=x.dtype)

    def off(layer: Any) -> float:
        plain, moved = (layer(y.flatten(1, 2)).unflatten(1, (6, 8)) for y in (x.unflatten(1, (6, 8)), x.unflatten(1, (6, 8)).roll(1, 2)))
        return naive.gap(moved[:, 1:-1, 2:-1], plain[:, 1:-1, 1:-2])

    return off(lambda y: peg(y, (6, 8))), off(lambda y: y + table)


@check("twins", "distance of the cheapest window from N^(1/4), 256, 1296 and 4096 tokens", below=0.0, control="of GSA alone")
def _() -> tuple[float, float]:
    windows = range(1, 65)
    counts = {256: 4, 1296: 6, 4096: 8}
    own = [abs(min(windows, key=lambda k: pair_flops(n, k)) - best) for n, best in counts.items()]
    alone = [abs(min(windows, key=lambda k: n**2 / k**2) - best) for n, best in counts.items()]
    return float(max(own)), float(min(alone))
