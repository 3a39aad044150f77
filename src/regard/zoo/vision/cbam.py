"""CBAM: a gate over channels, then one over pixels (id 226; Woo et al., 2018).

M_c = sigmoid(MLP(mean_hw x) + MLP(max_hw x)),  x' = x M_c;   M_s = sigmoid(BN(conv_7x7[max_c x'; mean_c x'])),  y = x' M_s
On the residual branch, before the addition. The paper's formula has no BN; the released code has (norm=False for the formula).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.plane_gates import ChannelGate, PlaneGate, SpatialGate, multiplied, multiplied_again
from regard.nn.parts import takes

ORDERS = ("channel-first", "spatial-first", "parallel")


@register("cbam", kind="module")
class CBAM(PlaneGate):
    """x (B, C, H, W) -> the same shape.

    pools: of the channel gate ("avg", "max", "lp", "lse"). spatial: whether there is a gate over pixels; its pools over channels are
    spatial_pools. order: "channel-first", "spatial-first", or "parallel": both gates from x, multiplied.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        pools: Sequence[str] = ("avg", "max"),
        spatial: bool = True,
        order: str = "channel-first",
        kernel: int = 7,
        spatial_pools: Sequence[str] = ("max", "avg"),
        norm: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.01,
    ):
        super().__init__()
        if order not in ORDERS or (order != ORDERS[0] and not spatial):
            raise RegardError(
                f"order={order!r}, spatial={spatial}; expected one of {', '.join(map(repr, ORDERS))}, and the first if spatial=False"
            )
        self.channels, self.order = channels, order
        self.over_channels = ChannelGate(channels, reduction, pools)
        self.over_pixels = SpatialGate(kernel, spatial_pools, norm, eps, momentum) if spatial else None

    def gate(self, x: Tensor) -> Tensor:
        if self.over_pixels is None:
            return self.over_channels.gate(x)
        if self.order == "parallel":
            return self.over_channels.gate(x) * self.over_pixels.gate(x)
        first, second = self.in_order(self.over_pixels)
        one = first.gate(x)
        return one * second.gate(x * one)

    def in_order(self, over_pixels: PlaneGate) -> tuple[PlaneGate, PlaneGate]:
        return (self.over_channels, over_pixels) if self.order == "channel-first" else (over_pixels, self.over_channels)

    @takes(x="batch channels height width")
    def forward(self, x: Tensor) -> Tensor:
        if self.over_pixels is None:
            return multiplied(x, self.over_channels.gate(x))
        if self.order == "parallel":
            return multiplied(x, self.over_channels.gate(x), self.over_pixels.gate(x))
        first, second = self.in_order(self.over_pixels)
        gated = x * first.gate(x)
        return multiplied_again(gated, second.gate(gated))
