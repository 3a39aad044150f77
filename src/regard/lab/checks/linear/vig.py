"""Checks of vig."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn, joined, misshapen, rms, silu, split
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.zoo.linear.vig import BiGLA2D, ViG, both_directions


def gated_matrix(q: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
    """Causal weights of gated linear attention, pair by pair."""
    total = log_decay.cumsum(-2)
    gap = (total[..., :, None, :] - total[..., None, :, :]).clamp_max(0)
    return torch.einsum("...ic,...jc,...ijc->...ij", q, k, gap.exp()).tril() * q.shape[-1] ** -0.5


@check("vig", "8 x 8 tokens, with gradients == the mean of two matrices of gates", below=1e-9, control="one direction")
def _() -> tuple[float, float]:
    q, k, v = qkv(64)
    ahead, back = (-torch.rand(1, 2, 64, 8, dtype=F64) for _ in range(2))
    leaves = q, k, v, ahead, back = tuple(x.requires_grad_() for x in (q, k, v, ahead, back))
    first = gated_matrix(q, k, ahead)
    second = gated_matrix(q.flip(-2), k.flip(-2), back.flip(-2)).flip(-1, -2)
    out = both_directions(q, k, v, ahead, back)
    return gap_with_gradients(out, (first + second) @ v / 2, leaves), naive.gap(out, first @ v)


@check(
    "vig",
    "reversing tokens and swapping gates reverses the output; gates of one: every pair once, the diagonal too",
    below=1e-10,
    control="gates not swapped",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(64)
    ahead, back = (-torch.rand(1, 2, 64, 8, dtype=F64) for _ in range(2))
    out = both_directions(q, k, v, ahead, back).flip(-2)
    swapped, same = (
        both_directions(*(x.flip(-2) for x in (q, k, v, *pair)))  # type: ignore[arg-type]
        for pair in ((back, ahead), (ahead, back))
    )
    free = both_directions(q, k, v, 0 * ahead, 0 * back)
    w = q @ k.mT * 8**-0.5
    truth = (w + torch.diag_embed(w.diagonal(dim1=-2, dim2=-1))) @ v / 2
    return max(naive.gap(swapped, out), naive.gap(free, truth)), naive.gap(same, out)


@check("vig", "the layer: share of tokens that one changed pixel does not reach, any resolution", below=0, control="its convolution alone")
def _() -> tuple[float, float]:
    layer = BiGLA2D(16, 2).double()
    shares = []
    for grid in ((8, 8), (5, 11)):
        x = torch.randn(1, grid[0] * grid[1], 16, dtype=F64)
        other = x.clone()
        other[:, 7] += 1
        shares.append(float(((layer(x, grid) - layer(other, grid)).abs().amax(-1) == 0).double().mean()))
        local = float(((layer.local(x, grid) - layer.local(other, grid)).abs().amax(-1) == 0).double().mean())
    return max(shares), local


@check(
    "vig",
    "the layer == its formula by hand: with a class token; with other widths, rank and temperature",
    below=1e-10,
    control="without the gate of local features",
)
def _() -> tuple[float, float]:
    x, own, other = torch.randn(2, 13, 16, dtype=F64), [], math.inf
    for cls, options in ((True, {}), (False, {"expand_k": 0.25, "expand_v": 1.5, "rank": 3, "tau": 4.0})):
        layer = BiGLA2D(16, 2, cls=cls, **options)  # type: ignore[arg-type]
        key, value, rank, tau = (4, 24, 3, 4.0) if options else (8, 16, 16, 16.0)
        shapes: dict[str, tuple[int, ...]] = {"conv.weight": (16, 1, 3, 3), "conv.bias": (16,), "qkv.weight": (2 * key + value, 16)}
        shapes |= {"gates.0.weight": (rank, 16), "gates.1.weight": (2 * key, rank), "gates.1.bias": (2 * key,), "out.weight": (16, value)}
        shapes |= {"mix.weight": (value, 16), "mix.bias": (value,), "norm_far.weight": (value // 2,), "norm_near.weight": (value // 2,)}
        own.append(misshapen(layer, shapes | ({"near.weight": (24, 16)} if options else {})))
        layer, y = drawn(layer), x if cls else x[:, 1:]
        plane = silu(F.conv2d(y[:, int(cls) :].mT.unflatten(-1, (3, 4)), layer.conv.weight, layer.conv.bias, padding=1, groups=16))
        local = torch.cat((y[:, : int(cls)], plane.flatten(2).mT), 1)
        q, k, v = (split(z, 2) for z in (local @ layer.qkv.weight.T).split([key, key, value], -1))
        down, up = layer.gates
        a, b = (torch.log(torch.sigmoid(split(g, 2))) / tau for g in (local @ down.weight.T @ up.weight.T + up.bias).chunk(2, -1))  # type: ignore[operator, union-attr]
        first, second = gated_matrix(q, k, a), gated_matrix(q.flip(-2), k.flip(-2), b.flip(-2)).flip(-1, -2)
        far = joined(rms((first + second) @ v / 2, 1e-5, layer.norm_far.weight))
        seen = local @ layer.near.weight.T if options else local  # type: ignore[operator]
        near = joined(rms(split(seen, 2), 1e-5, layer.norm_near.weight))
        r = torch.sigmoid(local @ layer.mix.weight.T + layer.mix.bias)
        own.append(naive.gap(layer(y, (3, 4)), (r * far + (1 - r) * near) @ layer.out.weight.T))
        other = min(other, naive.gap(layer(y, (3, 4)), far @ layer.out.weight.T))
    return max(own), other


@check(
    "vig",
    "the model == patches, x + mixer(norm x), x + gated MLP(norm x), the mean, by hand, at two resolutions",
    below=1e-9,
    control="without the norm at the end",
)
def _() -> tuple[float, float]:
    model, own, other = drawn(ViG(3, 5, dim=16, heads=2, layers=2, patch=2)), [], math.inf
    for size in ((8, 6), (4, 10)):
        image = torch.randn(2, 3, *size, dtype=F64)
        grid = (size[0] // 2, size[1] // 2)
        cells = image.unflatten(2, (grid[0], 2)).unflatten(4, (grid[1], 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = cells @ model.patch.weight.flatten(1).T + model.patch.bias  # type: ignore[operator]
        for n1, mixer, n2, mlp in zip(model.norms1, model.mixers, model.norms2, model.mlps, strict=True):
            x = x + mixer(rms(x, 0.0, n1.weight), grid)  # type: ignore[arg-type]
            z = rms(x, 0.0, n2.weight)  # type: ignore[arg-type]
            x = x + (silu(z @ mlp.gate.weight.T) * (z @ mlp.up.weight.T)) @ mlp.down.weight.T  # type: ignore[operator, union-attr]
        out = model(image)
        own.append(naive.gap(out, model.head(rms(x, 0.0, model.norm.weight).mean(1))))
        other = min(other, naive.gap(out, model.head(x.mean(1))))
    return max(own), other
