"""Checks of activator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.patch_mixers import mlp, patch_accuracy
from regard.lab.checks.shared.planes import gelu, image, layer_norm
from regard.lab.verification import check
from regard.nn import Attention
from regard.tasks.patches import at_least
from regard.zoo.vision.activator import ActivatorBlock, ActivatorUnit, ActivatorViT


def unit_by_hand(x: Tensor, layer: ActivatorUnit, normed: bool = True) -> Tensor:
    u, v = gelu(x @ layer.gate.weight.T + layer.gate.bias), x @ layer.up.weight.T + layer.up.bias
    if normed:
        u, v = layer_norm(u, layer.norm), layer_norm(v, layer.norm)
    return (u * v) @ layer.down.weight.T + layer.down.bias


@check(
    "activator",
    "values and gradients of the unit, of both forms of the block and of the classifier == by hand",
    below=1e-11,
    control="the unit without norms",
)
def _() -> tuple[float, float]:
    x, unit = image(3, 5, 6), drawn(ActivatorUnit(6, 7))
    gaps = [gap_with_gradients(unit(x), unit_by_hand(x, unit), (x, *unit.parameters()))]
    for with_mlp in (True, False):
        block = drawn(ActivatorBlock(6, 8, mlp=with_mlp))
        y = x + unit_by_hand(layer_norm(x, block.norm), block.unit)
        if with_mlp:
            assert block.mlp is not None
            y = y + mlp(layer_norm(y, block.norm), block.mlp)
        gaps.append(gap_with_gradients(block(x), y, (x, *block.parameters())))
    net, z = drawn(ActivatorViT(6, 8, 2, 0.0, mlp=False, channels=2, patch=3, classes=4)), image(2, 2, 6, 9)
    assert net.patches.bias is not None
    tokens = torch.stack(
        [(z[:, None, :, i : i + 3, j : j + 3] * net.patches.weight).sum((2, 3, 4)) + net.patches.bias for i in (0, 3) for j in (0, 3, 6)], 1
    )
    for one in net.blocks:
        assert isinstance(one, ActivatorBlock) and one.mlp is None
        tokens = tokens + unit_by_hand(layer_norm(tokens, one.norm), one.unit)
    gaps.append(naive.gap(net(z), tokens.mean(1) @ net.head.weight.T + net.head.bias))
    return max(gaps), naive.gap(unit(x), unit_by_hand(x, unit, normed=False))


@check("activator", "what a change of one token changes in the others", below=0.0, control="an attention layer")
def _() -> tuple[float, float]:
    x = torch.randn(2, 8, 16)
    y = x.clone()
    y[:, 3] += 1
    others = [i for i in range(8) if i != 3]
    layers = ActivatorBlock(16, 32), Attention(16, 2, causal=False)
    return tuple(naive.gap(layer(x)[:, others], layer(y)[:, others]) for layer in layers)  # type: ignore[return-value]


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.block = Attention(16, 2, causal=False), ActivatorBlock(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + self.attention(x))  # type: ignore[no-any-return]


@check(
    "activator",
    "accuracy of the exclusive or of two of 8 patches: additive over tokens, so 3/4 at best (median of 3 seeds)",
    below=0.78,
    control="an attention layer before the block",
)
def _() -> tuple[float, float]:
    return patch_accuracy(lambda: ActivatorBlock(16, 32)), patch_accuracy(WithAttention, steps=300)


@check(
    "activator", "accuracy of whether 4 of 8 patches are bright (median of 3 seeds)", above=0.95, control="the block's input set to zero"
)
def _() -> tuple[float, float]:
    class Blind(ActivatorBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.zeros_like(x))

    return patch_accuracy(lambda: ActivatorBlock(16, 32), at_least), patch_accuracy(lambda: Blind(16, 32), at_least, steps=20)
