"""ULSAM: one softmax map over the pixels for each group of channels (id 139; Saini et al., 2020).

A_n = softmax_hw(pw_1(maxpool_3x3(dw_1x1(x_n)))),  y_n = x_n + A_n x_n,  n of `groups` groups of C / groups channels;  2 C weights
In MobileNet-V2 it stands for blocks: for the two of 160 channels that repeat it saves 18% of parameters and 10% of products (the paper's 25% and 13% are of
blocks it does not name).  The released code has biases, BatchNorm (momentum 0.9) and ReLU after both convolutions (bare=False).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.planes import BatchNorm, max_around
from regard.nn.parts import takes


@register("ulsam", kind="module")
class ULSAM(nn.Module):
    """x (B, C, H, W) -> the same shape; `maps(x)` gives the groups' maps (B, groups, H, W), each summing to one.

    bare: the paper's formula, without biases, norms and ReLU. pool: width of the max pooling. momentum, eps: of the norms.
    """

    def __init__(self, channels: int, groups: int = 4, bare: bool = False, pool: int = 3, momentum: float = 0.9, eps: float = 1e-5):
        super().__init__()
        if groups < 1 or channels % groups or pool % 2 == 0:
            raise RegardError(f"channels={channels}, groups={groups}, pool={pool}; expected a multiple of groups, and an odd pool")
        self.channels, self.groups, self.pool = channels, groups, pool
        self.depthwise = nn.Conv2d(channels, channels, 1, groups=channels, bias=not bare)
        self.pointwise = nn.Conv2d(channels, groups, 1, groups=groups, bias=not bare)
        self.after = nn.ModuleList(
            [nn.Identity() if bare else nn.Sequential(BatchNorm(n, eps, momentum), nn.ReLU()) for n in (channels, groups)]
        )

    def scaled(self, x: Tensor) -> Tensor:
        """What the depthwise convolution, whose kernel is one value, its norm and ReLU make of x: one multiplication and addition where the norm is fixed."""
        scale, shift = self.depthwise.weight[:, 0], self.depthwise.bias
        if shift is None:
            return x * scale
        norm: BatchNorm = self.after[0][0]  # type: ignore[index, assignment]
        if self.training or norm.running_mean is None or norm.running_var is None:
            return self.after[0](x * scale + shift[:, None, None])  # type: ignore[no-any-return]
        factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
        moved = (shift - norm.running_mean) * factor + norm.bias
        return torch.addcmul(moved[:, None, None], x, scale * factor[:, None, None]).relu_()

    def maps(self, x: Tensor) -> Tensor:
        peaks = max_around(self.scaled(x), self.pool).unflatten(1, (self.groups, -1)).flatten(3)
        scores = (self.pointwise.weight[..., 0].mT @ peaks)[:, :, 0].unflatten(
            2, x.shape[2:]
        )  # a product a group, which a grouped convolution is not
        scores = scores if self.pointwise.bias is None else scores + self.pointwise.bias[:, None, None]
        scores = self.after[1](scores)
        return torch.softmax(scores.flatten(2), -1).view_as(scores)

    @takes(x="batch channels height width")
    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(1, (self.groups, -1))
        maps = self.maps(x)[:, :, None]
        return (torch.addcmul(grouped, grouped, maps) if maps.dtype == x.dtype else grouped + grouped * maps).flatten(1, 2)
