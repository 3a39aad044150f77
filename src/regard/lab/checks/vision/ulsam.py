"""Checks of ulsam."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.adapt import replace
from regard.lab import naive
from regard.lab.checks.shared.comparing import flops, gap_with_gradients
from regard.lab.checks.shared.planes import batch_norm, image, settled
from regard.lab.checks.shared.training import middle, trained
from regard.lab.verification import check
from regard.nn.images import timm_host
from regard.tasks.images import cued_bumps
from regard.zoo.vision.ulsam import ULSAM


def by_hand(layer: ULSAM, x: Tensor, bare: bool, shared: bool = False) -> Tensor:
    """Group by group; shared: the first group's map for all."""
    width, (h, w) = x.shape[1] // layer.groups, x.shape[2:]
    scale = layer.depthwise.weight.flatten()[:, None, None]
    z = x * scale
    if not bare:
        assert layer.depthwise.bias is not None and layer.pointwise.bias is not None
        z = batch_norm(z + layer.depthwise.bias[:, None, None], layer.after[0][0]).clamp_min(0)  # type: ignore[index]
    wide = torch.nn.functional.pad(z, (layer.pool // 2,) * 4, value=-torch.inf)
    z = wide.unfold(2, layer.pool, 1).unfold(3, layer.pool, 1).flatten(4).max(-1).values
    out, first = [], None
    for n in range(layer.groups):
        part = slice(n * width, (n + 1) * width)
        s = (layer.pointwise.weight[n, :, 0, 0, None, None] * z[:, part]).sum(1)
        if not bare:
            norm = layer.after[1][0]  # type: ignore[index]
            s = s + layer.pointwise.bias[n]  # type: ignore[index]
            s = ((s - norm.running_mean[n]) / (norm.running_var[n] + 1e-5).sqrt() * norm.weight[n] + norm.bias[n]).clamp_min(0)  # type: ignore[union-attr, index, operator]
        e = s.exp()
        weights = e / e.sum((1, 2), keepdim=True)
        first = weights if first is None or not shared else first
        out.append(x[:, part] + (first if shared else weights)[:, None] * x[:, part])
    assert z.shape[2:] == (h, w)
    return torch.cat(out, 1)


@check(
    "ulsam",
    "values and gradients of 1, 2 and 4 groups, bare and as released, of odd sizes == by hand, a group at a time",
    below=1e-12,
    control="one map for all groups",
)
def _() -> tuple[float, float]:
    gaps, other = [], 0.0
    for groups, bare, pool in ((1, True, 3), (2, True, 5), (4, True, 3), (2, False, 3), (4, False, 3)):
        layer, x = settled(ULSAM(8, groups, bare, pool)), image(2, 8, 5, 6)
        gaps.append(gap_with_gradients(layer(x), by_hand(layer, x, bare), (x, *layer.parameters())))
        other = naive.gap(layer(x), by_hand(layer, x, bare, shared=True))
    return max(gaps), other


@check("ulsam", "distance of maps' sums over pixels from one", below=1e-12, control="sigmoid maps")
def _() -> tuple[float, float]:
    layer, x = settled(ULSAM(8, 2, bare=True)), image(2, 8, 5, 6)
    wide = torch.nn.functional.max_pool2d(layer.depthwise(x), 3, 1, 1)
    return tuple(naive.gap(maps.sum((2, 3)), torch.ones(2, 2)) for maps in (layer.maps(x), layer.pointwise(wide).sigmoid()))  # type: ignore[return-value]


@check("ulsam", "what a change of one group's channels changes in the other group", below=0.0, control="one group")
def _() -> tuple[float, float]:
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    y = torch.cat((x[:, :4], torch.randn(2, 4, 5, 6, dtype=torch.float64)), 1)
    return tuple(
        naive.gap(layer(x)[:, :4], layer(y)[:, :4]) for layer in (settled(ULSAM(8, 2, bare=True)), settled(ULSAM(8, 1, bare=True)))
    )  # type: ignore[return-value]


@check("ulsam", "gain of an image without contrast, over 1 + 1 / HW, off one", below=1e-12, control="the gain of a random image")
def _() -> tuple[float, float]:
    layer, x = settled(ULSAM(8, 2)), image(2, 8, 5, 6)
    flat = x.mean((2, 3), keepdim=True).expand_as(x)
    return tuple(naive.gap(layer(y) / y, torch.full_like(y, 1 + 1 / 30)) for y in (flat, x))  # type: ignore[return-value]


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 16, 1),
        nn.ReLU(),
        ULSAM(16),
        nn.Conv2d(16, 1, 1),
    )


@torch.no_grad()
def mass_on_target(net: nn.Module) -> float:
    """Of the group whose map has most of it there."""
    x, y = cued_bumps(200, torch.Generator().manual_seed(7))
    assert isinstance(net, nn.Sequential) and isinstance(net[5], ULSAM)
    return float((net[5].maps(net[:5](x)) * (y > 0.1)).sum((2, 3)).mean(0).max())


@check(
    "ulsam",
    "mass of a map on the bump that the net must find, in a depthwise-separable net after 100 steps (median of 3 seeds; uniform: 0.056)",
    above=0.2,
    control="before training",
)
def _() -> tuple[float, float]:
    own = middle(lambda seed: mass_on_target(trained(small_net, cued_bumps, 100, seed=seed, lr=1e-2, batch=32, loss=F.mse_loss)))
    return own, mass_on_target(small_net().eval())


@check(
    "ulsam",
    "share of MobileNet-V2's products at 224 x 224 saved where ULSAM stands for the two blocks of 160 channels that repeat (and 18% of its parameters)",
    above=0.1,
    control="ULSAM behind these blocks",
)
def _() -> tuple[float, float]:
    def saved(instead: bool) -> tuple[float, float]:
        with torch.device("meta"):
            net = timm_host.load("torchvision").models.mobilenet_v2().eval()
            x = torch.zeros(1, 3, 224, 224)
            before = sum(p.numel() for p in net.parameters()), flops(lambda: net(x))
            assert before[0] == 3_504_872
            blocks = [sum(p.numel() for p in net.features[at].parameters()) for at in (15, 16)]
            replace(net, "features.1[56]", lambda part: ULSAM(160) if instead else nn.Sequential(part, ULSAM(160)))
            after = sum(p.numel() for p in net.parameters()), flops(lambda: net(x))
            own = 2 * 160 + 160 + 4 + 2 * 160 + 2 * 4  # weights, biases, and norms of 4 groups
            assert before[0] - after[0] == (sum(blocks) if instead else 0) - 2 * own
        return 1 - after[0] / before[0], 1 - after[1] / before[1]

    own = saved(True)
    assert own[0] > 0.18
    return own[1], saved(False)[1]
