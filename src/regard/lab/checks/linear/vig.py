"""Checks of vig."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.zoo.linear.vig import BiGLA2D, both_directions


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


@check("vig", "the layer == its formula by hand, with a class token", below=1e-10, control="without the gate of local features")
def _() -> tuple[float, float]:
    layer = BiGLA2D(16, 2, cls=True).double()
    x = torch.randn(2, 13, 16, dtype=F64)
    plane = F.silu(layer.conv(x[:, 1:].mT.unflatten(-1, (3, 4)))).flatten(2).mT
    local = torch.cat((x[:, :1], plane), 1)
    q, k, v = layer.qkv(local).split([8, 8, 16], -1)
    gates = layer.gates(local)
    heads = [y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (q, k, v, *gates.chunk(2, -1))]
    a, b = (torch.log(torch.sigmoid(g)) / 16 for g in heads[3:])
    first, second = gated_matrix(*heads[:2], a), gated_matrix(heads[0].flip(-2), heads[1].flip(-2), b.flip(-2)).flip(-1, -2)  # type: ignore[arg-type]

    def rms(y: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    o = rms(((first + second) @ heads[2] / 2).transpose(1, 2)).flatten(-2)
    near = rms(local.unflatten(-1, (2, 8))).flatten(-2)
    r = torch.sigmoid(layer.mix(local))
    y = layer(x, (3, 4))
    return naive.gap(y, layer.out(r * o + (1 - r) * near)), naive.gap(y, layer.out(o))
