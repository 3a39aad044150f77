"""Checks of moment-probing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.planes import gelu, image, layer_norm
from regard.lab.checks.shared.shipped_vit import shipped
from regard.lab.checks.shared.training import accuracy, middle, trained
from regard.lab.checks.shared.vits import block_by_hand, mlp_of, out_of, projected, scores, small_vit, tokens_by_hand
from regard.lab.verification import check
from regard.tasks.digits import photo_patches
from regard.zoo.vision.moment_probing import CrossCovHead, MomentProbe, MomentProbedViT


def covariances(layer: CrossCovHead, tokens: Tensor, pairs: list[tuple[int, int]], unit: bool, per_channel: bool = False) -> Tensor:
    p = tokens @ layer.proj.weight.T + layer.proj.bias
    parts = []
    for h in p.chunk(layer.heads, -1):
        h = layer_norm(h, layer.norm)
        parts.append(h - (h.mean(1, keepdim=True) if per_channel else h.mean((1, 2), keepdim=True)))
    found = []
    for i, j in pairs:
        c: Any = sum(parts[i][:, t, :, None] * parts[j][:, t, None, :] for t in range(tokens.shape[1])) / tokens.shape[1]
        found.append(c / c.square().sum(1, keepdim=True).sqrt() if unit else c)
    return torch.stack(found, 1)


def second_by_hand(layer: CrossCovHead, c: Tensor) -> Tensor:
    first, _, last = layer.convs
    return F.conv2d(gelu(F.conv2d(c, first.weight, stride=2)), last.weight, stride=2).flatten(1)  # type: ignore[arg-type]


@check(
    "moment-probing",
    "values and gradients of covariances and logits, four choices of pairs, class token and mean, with its norm and without == by hand",
    below=1e-10,
    control="means taken off channel by channel",
)
def _() -> tuple[float, float]:
    tokens, first, gaps = image(2, 5, 6), image(2, 6), []
    for pairs, wanted, unit in (
        ("near", [(0, 1), (1, 2), (2, 3)], True),
        ("half", [(0, 2), (1, 3)], True),
        ("first", [(0, 1), (0, 2), (0, 3)], True),
        ("all", [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], False),
    ):
        for mean_norm in (False, True):
            probe = drawn(MomentProbe(6, 3, 32, 4, pairs, mean_norm))
            c = covariances(probe.second, tokens, wanted, unit)
            gaps.append(naive.gap(probe.second.covariances(tokens), c))
            for given in (first, None):
                c = covariances(probe.second, tokens, wanted, unit)
                mean = tokens.mean(1) if given is None else given
                mean = layer_norm(mean, probe.norm, 1e-6) if mean_norm else mean
                second = second_by_hand(probe.second, c) @ probe.head2.weight.T + probe.head2.bias
                truth = (mean @ probe.head1.weight.T + probe.head1.bias + second) / 2
                leaves = (tokens, *probe.parameters())
                gaps.append(gap_with_gradients(probe(tokens, given), truth, leaves))
        if pairs == "near":
            other = naive.gap(probe.second.covariances(tokens), covariances(probe.second, tokens, wanted, unit, per_channel=True))
    return max(gaps), other


@check("moment-probing", "length of the second moment of 512 channels in 4 heads, off 2883", below=0.0, control="5 heads of 100 channels")
def _() -> tuple[float, float]:
    def size(proj: int, heads: int) -> float:
        return float(CrossCovHead(8, proj, heads)(torch.randn(1, 4, 8)).shape[1])

    return abs(size(512, 4) - 2883), abs(size(500, 5) - 2883)


def correlated(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """64 tokens of 16 channels, mean zero; channels 0 and 8 are correlated by 0.8 in label 1 and by -0.8 in label 0."""
    x, label = torch.randn(count, 64, 16, generator=generator), torch.randint(2, (count,), generator=generator)
    sign = 2.0 * label[:, None] - 1
    x[..., 8] = 0.8 * sign * x[..., 0] + 0.6 * x[..., 8]
    return x, label


@check(
    "moment-probing",
    "accuracy of two classes whose tokens differ in the sign of one correlation (median of 3 seeds)",
    above=0.85,
    control="a linear probe of the mean",
)
def _() -> tuple[float, float]:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.mean(1))  # type: ignore[no-any-return]

    def run(make: type[nn.Module] | object) -> float:
        return middle(lambda seed: accuracy(trained(make, correlated, 120, seed=seed, lr=1e-2, batch=32), correlated))

    return run(lambda: MomentProbe(16, 2, 64)), run(Mean)


@check(
    "moment-probing",
    "the probe on a frozen ViT with PSRP in its blocks, values and gradients of what learns == by hand",
    below=1e-10,
    control="the frozen blocks alone",
)
def _() -> tuple[float, float]:
    net, images = MomentProbedViT(small_vit(2), 3, rank=4, proj=32).to(F64), torch.randn(2, 3, 16, 16, dtype=F64)

    def by_hand(tuned: bool) -> Tensor:
        x = tokens_by_hand(net.vit, images)
        for one in net.vit.blocks:
            block, psrp = one.block, one.psrp
            if not tuned:
                x = block_by_hand(block, x)
                continue
            q, k, v = projected(block.attn, layer_norm(x, block.norm1, 1e-6))
            x = x + out_of(block.attn, scores(block.attn, q, k).softmax(-1) @ v)
            h = (x @ psrp.down.weight.T).clamp_min(0)
            x = x + (1 + h @ psrp.scale.weight.T) * mlp_of(block, x) + h @ psrp.shift.weight.T
        x = layer_norm(x, net.vit.norm, 1e-6)
        return net.probe(x[:, 1:], x[:, 0])  # type: ignore[no-any-return]

    leaves = tuple(p for p in net.parameters() if p.requires_grad)
    assert all("psrp" in name or name.startswith("probe.") for name, p in net.named_parameters() if p.requires_grad)
    return gap_with_gradients(net(images), by_hand(True), leaves), naive.gap(net(images), by_hand(False))


@check(
    "moment-probing",
    "accuracy of which of 14 photographs a held-out piece is of, on frozen tokens of the ViT on digits, 100 steps",
    above=0.45,
    control="a linear probe of the class token",
)
def _() -> tuple[float, float]:
    x, y = photo_patches(600, torch.Generator().manual_seed(0))
    seen, truth = photo_patches(400, torch.Generator().manual_seed(1), held_out=True)
    with torch.no_grad():
        tokens, other = (shipped().forward_features(images) for images in (x, seen))

    def right(probe: nn.Module, both: bool) -> float:
        def told(f: Tensor) -> Tensor:
            return probe(f[:, 1:], f[:, 0]) if both else probe(f[:, 0])  # type: ignore[no-any-return]

        optimizer, g = torch.optim.AdamW(probe.parameters(), 3e-3), torch.Generator().manual_seed(0)
        for _ in range(100):
            at = torch.randint(600, (64,), generator=g)
            optimizer.zero_grad()
            F.cross_entropy(told(tokens[at]), y[at]).backward()
            optimizer.step()
        with torch.no_grad():
            return float((told(other).argmax(1) == truth).double().mean())

    torch.manual_seed(0)
    return right(MomentProbe(96, 14, 64, 4), True), right(nn.Linear(96, 14), False)
