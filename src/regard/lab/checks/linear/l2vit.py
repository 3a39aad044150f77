"""Checks of l2vit."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.engine import weights
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn, joined, split
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.nn.images.grid import GridAttention, GridBlock, GridMLP, GridNet, LocalConcentration, WindowAttention
from regard.tasks.statistics import concentration


@check("l2vit", "== tau relu(q) relu(k)^T v / max(row sum, 100), with gradients", below=1e-10, control="without the clamp")
def _() -> tuple[float, float]:
    q, k, v = qkv(64, 16)
    tau = torch.tensor([0.3, 0.7], dtype=F64)
    leaves = q, k, v, tau = tuple(x.requires_grad_() for x in (q, k, v, tau))
    w = q.clamp_min(0) @ k.clamp_min(0).mT
    total = w.sum(-1, keepdim=True)
    out = attend(q, k, v, "l2vit", tau=tau)
    truth = tau[:, None, None] * (w / total.clamp_min(100)) @ v
    few = [x[..., :12] for x in (q, k, v)]  # the default temperature of 12 channels, in full precision
    w12 = few[0].clamp_min(0) @ few[1].clamp_min(0).mT
    default = naive.gap(attend(*few, "l2vit"), 12**-0.5 * (w12 / w12.sum(-1, keepdim=True).clamp_min(100)) @ few[2])
    return max(default, gap_with_gradients(out, truth, leaves)), naive.gap(out, tau[:, None, None] * (w / total) @ v)


@check(
    "l2vit", "row sums over tau: small scores below 1, for q x 100 at 1: the larger miss", below=1e-9, control="q x 100 with q's own sums"
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(64, 16)
    q, k = q.abs() * 0.1, k.abs()
    small, large = (weights(c * q, k, "l2vit").sum(-1) * 4 for c in (1, 100))  # type: ignore[union-attr]
    true = (0.1 * (q / 0.1) @ k.mT).sum(-1) / 100
    return max(naive.gap(large, torch.ones_like(large)), naive.gap(small, true)), naive.gap(small, torch.ones_like(small))


@check("l2vit", "Jacobian between windows: zero for the window block", below=0, control="for the linear block")
def _() -> tuple[float, float]:
    x = torch.randn(1, 8, 14, 14, dtype=F64)

    def leak(layer: torch.nn.Module) -> float:
        moved = x.clone()
        moved[..., :7, :7] += 1.0
        return naive.gap(layer(moved)[..., 7:, 7:], layer(x)[..., 7:, 7:])

    return leak(WindowAttention(8, 2).double()), leak(GridAttention(8, 2, (14, 14), "l2vit").double())


@check("l2vit", "local concentration commutes with shifts, away from borders", below=1e-10, control="the shift by another pixel")
def _() -> tuple[float, float]:
    layer = LocalConcentration(4).double().eval()
    x = torch.randn(1, 4, 30, 30, dtype=F64)
    y, shifted = layer(x), layer(x.roll((1, 2), (2, 3)))
    found = [naive.gap(shifted[..., 10:20, 10:20], y.roll(by, (2, 3))[..., 10:20, 10:20]) for by in ((1, 2), (2, 1))]
    return found[0], found[1]


def normed(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    """LayerNorm over the channels of (B, C, H, W)."""
    y = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    return y * norm.weight[:, None, None] + norm.bias[:, None, None]


def depthwise(x: Tensor, conv: torch.nn.Conv2d) -> Tensor:
    """Every channel's own sum over its neighbours, zeros outside."""
    width = conv.kernel_size[0]
    wide, out = F.pad(x, (width // 2,) * 4), torch.zeros_like(x)
    for a in range(width):
        for b in range(width):
            out = out + conv.weight[:, 0, a, b, None, None] * wide[:, :, a : a + x.shape[2], b : b + x.shape[3]]
    assert conv.bias is not None
    return out + conv.bias[:, None, None]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def linear_tokens(x: Tensor, layer: GridAttention) -> Tensor:
    """L2ViT's linear attention on (B, C, H, W), tau learned."""
    tokens = x.flatten(2).mT
    q, k, v = (split(y, 2) for y in layer.qkv(tokens).chunk(3, -1))
    w = q.clamp_min(0) @ k.clamp_min(0).mT
    o = layer.inputs.learned["tau"][:, None, None] * (w @ v) / w.sum(-1, keepdim=True).clamp_min(100)
    return layer.out(joined(o)).mT.unflatten(-1, x.shape[2:])  # type: ignore[no-any-return]


def window_tokens(x: Tensor, layer: WindowAttention) -> Tensor:
    """Softmax attention inside 7 x 7 windows, a window at a time, the last filled up with zeros."""
    h, w = x.shape[2:]
    out, wide = torch.zeros_like(x), F.pad(x, (0, -w % 7, 0, -h % 7))
    for top in range(0, h, 7):
        for left in range(0, w, 7):
            tokens = wide[:, :, top : top + 7, left : left + 7].flatten(2).mT
            q, k, v = (split(y(tokens), 2) for y in (layer.inner.q, layer.inner.k, layer.inner.v))
            o = layer.inner.out(joined((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v)).mT.unflatten(-1, (7, 7))
            out[:, :, top : top + 7, left : left + 7] = o[:, :, : min(7, h - top), : min(7, w - left)]
    return out


def mlp(x: Tensor, layer: GridMLP) -> Tensor:
    up = gelu(F.conv2d(x, layer.up.weight, layer.up.bias))
    return F.conv2d(up + depthwise(up, layer.local), layer.down.weight, layer.down.bias)


@check(
    "l2vit",
    "both blocks == by hand: convolution, attention (linear, or in windows), local concentration (or a second convolution), MLP",
    below=1e-9,
    control="without local concentration",
)
def _() -> tuple[float, float]:
    x = torch.randn(2, 8, 9, 8, dtype=F64)
    linear = drawn(GridBlock(8, 2, (9, 8), "l2vit", ratio=2.0, concentration=True))
    y = x + depthwise(x, linear.place)
    y = y + linear_tokens(normed(y, linear.mixer.norm), linear.mixer.inner)  # type: ignore[arg-type, union-attr]
    assert linear.concentration is not None
    first, _, batch, second = linear.concentration[1].layers  # type: ignore[misc, union-attr]
    z = gelu(depthwise(normed(y, linear.concentration[0].norm), first))  # type: ignore[arg-type, union-attr]
    mean, spread = z.mean((0, 2, 3), keepdim=True), (z.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    local = depthwise((z - mean) / spread * batch.weight[:, None, None] + batch.bias[:, None, None], second)
    found, truths = linear(x), []
    for more in (local, 0.0):
        w = y + more
        truths.append(w + mlp(normed(w, linear.mlp[0].norm), linear.mlp[1]))  # type: ignore[arg-type, union-attr]
    window = drawn(GridBlock(8, 2, (9, 8), "window", ratio=2.0))
    assert window.again is not None
    y = x + depthwise(x, window.place)
    y = y + window_tokens(normed(y, window.mixer[0].norm), window.mixer[1])  # type: ignore[arg-type, index, union-attr]
    y = y + depthwise(y, window.again)
    other = y + mlp(normed(y, window.mlp[0].norm), window.mlp[1])  # type: ignore[arg-type, union-attr]
    return max(naive.gap(found, truths[0]), naive.gap(window(x), other)), naive.gap(found, truths[1])


@check(
    "l2vit",
    "what an output pixel feels of the others: share within the 7 x 7 around it, 14 x 14 pixels, with local concentration",
    above=0.3,
    control="without",
)
def _() -> tuple[float, float]:
    block = drawn(GridBlock(8, 2, (14, 14), "l2vit", concentration=True)).eval()
    mixer, local, x = block.mixer, block.concentration, torch.randn(1, 8, 14, 14, dtype=F64)
    assert local is not None

    def share(function: Callable[[Tensor], Tensor]) -> float:
        felt = torch.zeros(196, 196, dtype=F64)
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        for at in range(196):
            (slope,) = torch.autograd.grad(y[0, :, at // 14, at % 14].sum(), leaf, retain_graph=True)
            felt[at] = slope[0].abs().sum(0).flatten()
        felt.fill_diagonal_(0.0)
        found = float(concentration(felt, (14, 14), 7))
        by_hand = 0.0
        for i in range(196):
            near = [j for j in range(196) if abs(j // 14 - i // 14) <= 3 and abs(j % 14 - i % 14) <= 3]
            by_hand += float(felt[i, near].sum() / felt[i].sum()) / 196
        return found if abs(found - by_hand) < 1e-10 else math.nan

    return share(lambda x: local(mixer(x))), share(mixer)


@check(
    "l2vit",
    "the network == stem, stages with a strided convolution between, blocks by name, norm, mean, linear map; concentration where it is linear",
    below=1e-9,
    control="without the convolution between stages",
)
def _() -> tuple[float, float]:
    net = drawn(GridNet(3, 8, 5, (("window", "l2vit"), ("softmax",)), (8, 8), (2, 2), patch=2, concentration=True)).eval()
    x = torch.randn(2, 3, 8, 8, dtype=F64)
    stem, window, linear, between, last = net.layers
    kinds = [type(linear.mixer.inner), type(last.mixer.inner)] == [GridAttention, Attention]  # type: ignore[union-attr]
    kinds = kinds and window.concentration is None and linear.concentration is not None and last.concentration is None
    y = linear(window(F.conv2d(x, stem.weight, stem.bias, stride=2)))  # type: ignore[arg-type]
    down = F.conv2d(y, between.weight, between.bias, stride=2)  # type: ignore[arg-type]
    z = down + depthwise(down, last.place)  # type: ignore[arg-type]
    tokens, inner = normed(z, last.mixer.norm).flatten(2).mT, last.mixer.inner  # type: ignore[arg-type, union-attr]
    q, k, v = (split(p(tokens), 2) for p in (inner.q, inner.k, inner.v))  # type: ignore[operator, union-attr]
    z = z + last.mixer.inner.out(joined((q @ k.mT / 2).softmax(-1) @ v)).mT.unflatten(-1, (2, 2))  # type: ignore[operator, union-attr]
    z = z + mlp(normed(z, last.mlp[0].norm), last.mlp[1])  # type: ignore[arg-type, index, union-attr]
    truth = normed(z, net.norm.norm).mean((2, 3)) @ net.head.weight.T + net.head.bias
    skipped = net.head(net.norm(last(y[:, :, ::2, ::2])).mean((2, 3)))
    return naive.gap(net(x), truth) if kinds else math.inf, naive.gap(net(x), skipped)
