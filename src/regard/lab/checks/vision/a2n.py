"""Checks of a2n."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.planes import image, pointwise
from regard.lab.verification import check
from regard.tasks.images import bumps
from regard.zoo.vision.a2n import A2N, AttentionInAttention


def lrelu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def conv(x: Tensor, layer: Any) -> Tensor:
    """Sums over the taps of a convolution with zeros around."""
    k, (h, w) = layer.weight.shape[-1], x.shape[2:]
    wide = F.pad(x, (k // 2,) * 4)
    out: Any = sum(
        torch.einsum("oc,bchw->bohw", layer.weight[:, :, a, b], wide[:, :, a : a + h, b : b + w]) for a in range(k) for b in range(k)
    )
    return out if layer.bias is None else out + layer.bias[:, None, None]


def block_by_hand(x: Tensor, block: Any, shares: Tensor | None = None) -> Tensor:
    h = lrelu(pointwise(x, block.first.weight))
    hidden = (h.mean((2, 3)) @ block.router[0].weight.T).clamp_min(0)
    e = torch.exp(hidden @ block.router[2].weight.T / block.temperature)
    pi = (e / e.sum(1, keepdim=True) if shares is None else shares)[:, :, None, None, None]
    a = block.attention
    attended = conv(conv(h, a.value) / (1 + torch.exp(-pointwise(lrelu(conv(h, a.first)), a.mix.weight, a.mix.bias))), a.last)
    return x + pointwise(lrelu(pi[:, 0] * attended + pi[:, 1] * conv(h, block.plain)), block.last.weight)


@check(
    "a2n",
    "values and gradients of the block, both kernels, and of nets of scale 2, 3 and 4 on 5 x 4 pixels == sums over taps",
    below=1e-11,
    control="equal shares of the branches",
)
def _() -> tuple[float, float]:
    gaps, x = [], image(2, 8, 5, 4)
    for kernel in (3, 1):
        block = drawn(AttentionInAttention(8, plain_kernel=kernel, temperature=0.5))
        gaps.append(gap_with_gradients(block(x), block_by_hand(x, block), (x, *block.parameters())))
    other = naive.gap(block(x), block_by_hand(x, block, torch.full((2, 2), 0.5, dtype=x.dtype)))
    for scale in (2, 3, 4):
        net, y = drawn(A2N(scale, 4, 6, 2)), image(1, 3, 5, 4)
        first = h = conv(y, net.first)
        for one in net.blocks:
            h = block_by_hand(h, one)
        h = first + conv(h, net.close)
        for up in net.ups:
            parts: list[Any] = list(up.children())
            times = 2 if scale == 4 else scale
            h = conv(h.repeat_interleave(times, 2).repeat_interleave(times, 3), parts[0])
            h = lrelu(conv(lrelu(h / (1 + torch.exp(-pointwise(h, parts[1].conv.weight, parts[1].conv.bias)))), parts[2]))
        truth = conv(h, net.last) + F.interpolate(y, scale_factor=float(scale), mode="bilinear", align_corners=False)
        gaps.append(gap_with_gradients(net(y), truth, (y, *net.parameters())))
    return max(gaps), other


@check("a2n", "parameters of A2N and A2N-M of scale 4, off 1,047,459 and 842,659", below=0.0, control="branch kernels swapped")
def _() -> tuple[float, float]:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in A2N(4, plain_kernel=kernel).parameters()) for kernel in (3, 1)]
    wanted = [1_047_459, 842_659]
    return tuple(float(max(abs(a - b) for a, b in zip(found, wanted, strict=True))) for found in (counts, counts[::-1]))  # type: ignore[return-value]


@check("a2n", "gradient of the attention branch where the router names the other one", below=0.0, control="a fresh router")
def _() -> tuple[float, float]:
    def felt(closed: bool) -> float:
        block: Any = AttentionInAttention(8)
        x = torch.randn(2, 8, 5, 4).abs()
        if closed:
            for p in block.first.parameters():
                p.data.abs_()
            block.router[0].weight.data.fill_(1.0)
            block.router[2].weight.data.copy_(torch.tensor([[-1e6], [1e6]]).expand(-1, 2))
            assert torch.equal(block.weights(x), torch.tensor([[0.0, 1.0]]).expand(2, -1))
        block(x).sum().backward()
        return max(float(p.grad.abs().max()) for p in block.attention.parameters() if p.grad is not None)

    return felt(True), felt(False)


@check("a2n", "spread of a block's branch weights over images; they sum to one", above=1e-3, control="a router of zeros")
def _() -> tuple[float, float]:
    net, x = A2N(2, 16, 8, 2, temperature=0.1), torch.randn(4, 3, 6, 6)
    found = net.branch_weights(x)
    assert found.shape == (2, 4, 2) and naive.gap(found.sum(-1), torch.ones(2, 4)) < 1e-6
    spread = float(found.std(1).max())
    for block in net.blocks:
        nn.init.zeros_(block.router[2].weight)  # type: ignore[index, union-attr, arg-type]
    return spread, float(net.branch_weights(x).std(1).max())


@check("a2n", "rise in dB over bilinear of 16 images enlarged twice, after 200 steps", above=1.0, control="untrained")
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    large = (bumps(16 * torch.rand(16, 12, 2), 16, 1.0) * torch.randn(16, 12, 1, 1)).sum(1, keepdim=True)
    small = F.avg_pool2d(large, 2)
    net = A2N(2, 12, 8, 2, colours=1)

    def gain() -> float:
        plain = F.interpolate(small, scale_factor=2.0, mode="bilinear", align_corners=False)
        with torch.no_grad():
            return float(10 * torch.log10((plain - large).square().mean() / (net(small) - large).square().mean()))

    before = gain()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(200):
        optimizer.zero_grad()
        (net(small) - large).abs().mean().backward()
        optimizer.step()
    return gain(), before
