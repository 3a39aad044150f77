"""Checks of ninformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import flops, gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.patch_mixers import mlp, patch_accuracy
from regard.lab.checks.shared.planes import image, layer_norm
from regard.lab.verification import check
from regard.zoo.vision.ninformer import MixerGatingUnit, MLPMixer, NiNBlock, NiNformer


def mixed(v: Tensor, layer: MLPMixer) -> Tensor:
    v = v + mlp(layer_norm(v, layer.token_norm).mT, layer.token_mlp).mT
    return v + mlp(layer_norm(v, layer.channel_norm), layer.channel_mlp)


def unit_by_hand(x: Tensor, layer: MixerGatingUnit) -> Tensor:
    return (x @ layer.proj.weight.T + layer.proj.bias) * mixed(x, layer.mixer)


@check(
    "ninformer",
    "values and gradients of the unit, of a block with one norm and with two, and of the classifier (hidden widths of their own) == by hand",
    below=1e-11,
    control="a sigmoid gate",
)
def _() -> tuple[float, float]:
    x, unit = image(3, 5, 6), drawn(MixerGatingUnit(6, 5, 7, 9))
    gaps = [gap_with_gradients(unit(x), unit_by_hand(x, unit), (x, *unit.parameters()))]
    for shared in (True, False):
        block = drawn(NiNBlock(6, 5, 8, shared_norm=shared))
        first = x + unit_by_hand(layer_norm(x, block.norm), block.unit)
        second = block.norm if shared else block.second
        assert second is not None
        gaps.append(gap_with_gradients(block(x), first + mlp(layer_norm(first, second), block.mlp), (x, *block.parameters())))
    net, y = drawn(NiNformer(6, 8, 2, 0.0, side=6, channels=2, patch=3, classes=4)), image(2, 2, 6, 6)
    weight, bias = net.patches.weight, net.patches.bias
    assert bias is not None
    tokens = torch.stack([(y[:, None, :, i : i + 3, j : j + 3] * weight).sum((2, 3, 4)) + bias for i in (0, 3) for j in (0, 3)], 1)
    for one in net.blocks:
        assert isinstance(one, NiNBlock)
        tokens = tokens + unit_by_hand(layer_norm(tokens, one.norm), one.unit)
        tokens = tokens + mlp(layer_norm(tokens, one.norm), one.mlp)
    gaps.append(naive.gap(net(y), tokens.mean(1) @ net.head.weight.T + net.head.bias))
    return max(gaps), naive.gap(unit(x), (x @ unit.proj.weight.T + unit.proj.bias).sigmoid() * mixed(x, unit.mixer))


class NoTokens(nn.Module):
    """The block whose mixer's path over tokens is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.block = NiNBlock(16, 8, 32)
        last = self.block.unit.mixer.token_mlp[3]
        for p in (last.weight, last.bias):
            nn.init.zeros_(p).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)  # type: ignore[no-any-return]


@check(
    "ninformer",
    "accuracy of the exclusive or of two of 8 patches, one block (median of 3 seeds)",
    above=0.95,
    control="no mixing of tokens",
)
def _() -> tuple[float, float]:
    return patch_accuracy(lambda: NiNBlock(16, 8, 32)), patch_accuracy(NoTokens)


@check("ninformer", "change of a permuted set's outputs, without mixing of tokens", below=1e-12, control="with it")
def _() -> tuple[float, float]:
    x, order = image(2, 8, 16), torch.randperm(8)
    plain, whole = NoTokens().double(), drawn(NiNBlock(16, 8, 32))
    return naive.gap(plain(x[:, order]), plain(x)[:, order]), naive.gap(whole(x[:, order]), whole(x)[:, order])


@check(
    "ninformer",
    "parameters and products of the classifier of CIFAR-10, off their closed forms: 2,652,170 and 218.9 million",
    below=0.0,
    control="one weight a pair of tokens in place of the token MLP",
)
def _() -> tuple[float, float]:
    n, c, h, colours, classes, layers = 64, 256, 512, 48, 10, 4
    two = 2 * c * h + h + c
    mixing = {"an MLP of tokens": (2 * n * h + h + n, 2 * n * h * c), "one map": (n * n + n, n * n * c)}
    with torch.device("meta"):
        net = NiNformer().eval()
        count, run = sum(p.numel() for p in net.parameters()), flops(lambda: net(torch.zeros(1, 3, 32, 32))) // 2

    def off(kind: str) -> float:
        own, products = mixing[kind]
        size = layers * (2 * c + c * c + c + 4 * c + own + 2 * two) + (colours + 1) * c + (c + 1) * classes
        made = layers * (n * c * c + products + 4 * n * c * h) + n * colours * c + c * classes
        return float(abs(count - size) + abs(run - made))

    assert count == 2_652_170 and round(run / 1e6, 1) == 218.9
    return off("an MLP of tokens"), off("one map")
