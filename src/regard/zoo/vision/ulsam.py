"""ULSAM: one softmax map over the pixels for each group of channels (id 139; Saini et al., 2020).

A_n = softmax_hw(pw_1(maxpool_3x3(dw_1x1(x_n)))),  y_n = x_n + A_n x_n,  n of `groups` groups of C / groups channels;  2 C weights
The released code has biases, BatchNorm (momentum 0.9) and ReLU after both convolutions (bare=False).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.plane_gates import PlaneGate
from regard.nn.planes import BatchNorm


@register("ulsam", kind="module")
class ULSAM(PlaneGate):
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

    def maps(self, x: Tensor) -> Tensor:
        wide = F.max_pool2d(self.after[0](self.depthwise(x)), self.pool, 1, self.pool // 2)
        scores = self.after[1](self.pointwise(wide))
        return torch.softmax(scores.flatten(2), -1).view_as(scores)

    def gate(self, x: Tensor) -> Tensor:
        return 1 + self.maps(x).repeat_interleave(self.channels // self.groups, 1)
