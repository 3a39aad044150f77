"""Checks of convit."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn, joined, split
from regard.lab.checks.shared.planes import gelu, image, layer_norm
from regard.lab.verification import check
from regard.nn.images.token_attention import TokenAttention
from regard.zoo.vision.convit import GPSA, ConViT, conv_to_gpsa


def positional(layer: GPSA, shape: tuple[int, int]) -> Tensor:
    """Scores (heads, N, N), pair by pair."""
    places = [(i, j) for i in range(shape[0]) for j in range(shape[1])]
    rows = []
    for i, j in places:
        near = torch.tensor([[b - j, a - i, (b - j) ** 2 + (a - i) ** 2] for a, b in places], dtype=F64)
        rows.append(near @ layer.position.weight.T + layer.position.bias)
    return torch.stack(rows).permute(2, 0, 1)


def weights(layer: GPSA, x: Tensor, shape: tuple[int, int], logits: bool = False) -> Tensor:
    q, k = (split(y, layer.heads) for y in (x @ layer.qk.weight.T).chunk(2, -1))
    s, place = q @ k.mT / q.shape[-1] ** 0.5, positional(layer, shape)
    share = 1 / (1 + torch.exp(-layer.gate))[:, None, None]
    if logits:  # mixed before one softmax
        return ((1 - share) * s + share * place).softmax(-1)
    return (1 - share) * s.softmax(-1) + share * place.softmax(-1)


def read(layer: GPSA, x: Tensor, a: Tensor) -> Tensor:
    return joined(a @ split(x @ layer.v.weight.T, layer.heads)) @ layer.out.weight.T + layer.out.bias


@check(
    "convit",
    "values, gradients and weights of GPSA on 3 x 4 and 3 x 3 tokens, and distances read == by hand, pair by pair",
    below=1e-11,
    control="scores mixed before one softmax",
)
def _() -> tuple[float, float]:
    gaps, layer = [], drawn(GPSA(8, 4), 0.2)
    for shape, given in (((3, 4), (3, 4)), ((3, 3), None)):
        x = image(2, shape[0] * shape[1], 8)
        truth = weights(layer, x, shape)
        gaps.append(gap_with_gradients(layer(x, given), read(layer, x, truth), (x, *layer.parameters())))
        gaps.append(naive.gap(layer.weights(x, given), truth))
        distance = torch.tensor(
            [[math.dist(divmod(i, shape[1]), divmod(j, shape[1])) for j in range(x.shape[1])] for i in range(x.shape[1])], dtype=F64
        )
        gaps.append(naive.gap(layer.nonlocality(x, given), (truth * distance).sum(-1).mean((0, 2))))
    return max(gaps), naive.gap(layer(x), read(layer, x, weights(layer, x, (3, 3), logits=True)))


@check(
    "convit", "a 3 x 3 convolution of taps of a head's rank as GPSA, inner tokens of 9 x 7", below=1e-6, control="rows and columns swapped"
)
def _() -> tuple[float, float]:
    conv = nn.Conv2d(18, 18, 3, padding=1).to(F64)
    with torch.no_grad():
        low = torch.randn(9, 18, 2, dtype=F64) @ torch.randn(9, 2, 18, dtype=F64)
        conv.weight.copy_(low.permute(1, 2, 0).unflatten(-1, (3, 3)))
    x = torch.randn(2, 18, 9, 7, dtype=F64)
    out = conv_to_gpsa(conv, 25.0)(x.flatten(2).mT, (9, 7)).mT.unflatten(-1, (9, 7))[..., 1:-1, 1:-1]
    turned = F.conv2d(x, conv.weight.mT, conv.bias, padding=1)[..., 1:-1, 1:-1]
    return naive.gap(out, conv(x)[..., 1:-1, 1:-1]), naive.gap(out, turned)


@check(
    "convit",
    "the local start: head p's scores of places are -alpha |delta - D|^2 but for a constant, D = (p // 3 - 1, p % 3 - 1), and W_v = 1",
    below=1e-5,
    control="offsets with x and y swapped",
)
def _() -> tuple[float, float]:
    layer = GPSA(18, 9, locality=1.5).to(F64)
    found = positional(layer, (4, 5)).log_softmax(-1)

    def off(swap: bool) -> float:
        gaps = [0.0 if swap else naive.gap(layer.v.weight, torch.eye(18, dtype=F64))]
        for p in range(9):
            d = (p // 3 - 1, p % 3 - 1)
            dx, dy = d[::-1] if swap else d
            s = torch.tensor([[-1.5 * ((j % 5 - i % 5 - dx) ** 2 + (j // 5 - i // 5 - dy) ** 2) for j in range(20)] for i in range(20)])
            gaps.append(naive.gap(found[p], s.to(F64).log_softmax(-1)))
        return max(gaps)

    return off(False), off(True)


@check("convit", "with closed gates (lam = -50), off plain attention of the same weights", below=1e-10, control="lam = 1")
def _() -> tuple[float, float]:
    layer, x = drawn(GPSA(8, 4), 0.2), image(2, 12, 8)
    plain = TokenAttention(8, 4).to(F64)
    plain.q.weight, plain.kv.weight = nn.Parameter(layer.qk.weight[:8]), nn.Parameter(torch.cat((layer.qk.weight[8:], layer.v.weight)))
    plain.out = layer.out
    gaps = []
    for gate in (-50.0, 1.0):
        nn.init.constant_(layer.gate, gate)
        gaps.append(naive.gap(layer(x, (3, 4)), plain(x)))
    return gaps[0], gaps[1]


@check(
    "convit",
    "mean distance read of the local start, less what it is with lam 3 lower, in tokens: every head reads farther",
    below=0.0,
    control="with lam 3 higher",
)
def _() -> tuple[float, float]:
    x, lower = torch.randn(2, 81, 18), []
    layer = GPSA(18, 9)
    start = layer.nonlocality(x)
    for change in (-3.0, 3.0):
        nn.init.constant_(layer.gate, 1 + change)
        lower.append(float((start - layer.nonlocality(x)).max()))
    return lower[0], lower[1]


@check(
    "convit",
    "the net of three local blocks and one plain == by hand: places, the class token behind the local blocks, its norm",
    below=1e-10,
    control="the class token from the first block on, behind the patches",
)
def _() -> tuple[float, float]:
    net, x = drawn(ConViT(4, 2, 4, 3, side=6, patch=2, channels=2, classes=3), 0.2), image(2, 2, 6, 6)

    def block_by_hand(y: Tensor, block: Any) -> Tensor:
        h, layer = layer_norm(y, block.norm1, 1e-6), block.attention
        if isinstance(layer, GPSA):
            own = h[:, :9]
            y = y + F.pad(read(layer, own, weights(layer, own, (3, 3))), (0, 0, 0, y.shape[1] - 9))
        else:
            assert isinstance(layer, TokenAttention)
            q, (k, v) = h @ layer.q.weight.T, (h @ layer.kv.weight.T).chunk(2, -1)
            q, k, v = (split(z, 4) for z in (q, k, v))
            y = y + joined((q @ k.mT * 2**-0.5).softmax(-1) @ v) @ layer.out.weight.T + layer.out.bias
        first, last = block.mlp[0], block.mlp[3]
        return y + gelu(layer_norm(y, block.norm2, 1e-6) @ first.weight.T + first.bias) @ last.weight.T + last.bias  # type: ignore[arg-type]

    def by_hand(early: bool) -> Tensor:
        assert net.places is not None
        y = F.conv2d(x, net.patches.weight, net.patches.bias, 2).flatten(2).mT + net.places
        token = net.token.expand(2, -1, -1)
        y = torch.cat((y, token), 1) if early else y
        for block in net.blocks[:3]:
            y = block_by_hand(y, block)
        y = block_by_hand(y if early else torch.cat((token, y), 1), net.blocks[3])
        return layer_norm(y, net.norm, 1e-6)[:, -1 if early else 0] @ net.head.weight.T + net.head.bias

    return naive.gap(net(x), by_hand(False)), naive.gap(net(x), by_hand(True))
