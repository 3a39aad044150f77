"""A little attention: a gate of channels and pixels that costs almost nothing, put where a search says (id 233; Eisenbach et al., 2023).

c = sigmoid(W_2 relu(W_1 mean_hw x)),  s = sigmoid(conv_3x3(conv_1x1 x)), 1 x 1 to one channel;  y = x + x c s
The last layers start at zero: y = 1.25 x.  No map of HW x HW or C x C.
The paper gives no layout; this one is built from its aims, with the search of places over accuracy and latency.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.plane_gates import PlaneGate, narrowed, over_plane
from regard.nn.images.planes import BatchNorm
from regard.nn.parts import takes


@register("little-attention-block", kind="module")
class LiteAttention(PlaneGate):
    """x (B, C, H, W) -> the same shape. reduction: of the channels' net. kernel: of the pixels' last convolution."""

    def __init__(self, channels: int, reduction: int = 16, kernel: int = 3):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise RegardError(f"kernel={kernel}; expected an odd number")
        hidden = narrowed(channels, reduction)
        self.channels, self.kernel = channels, kernel
        self.over_channels = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.over_pixels = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.Conv2d(1, 1, kernel, padding=kernel // 2))
        for last in (self.over_channels[2], self.over_pixels[1]):
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """c (B, C, 1, 1) and s (B, 1, H, W)."""
        narrow, last = self.over_pixels
        pixels = over_plane(narrow.weight[0, :, 0, 0], x) + narrow.bias  # type: ignore[index, operator]
        return torch.sigmoid(self.over_channels(x.mean((2, 3))))[..., None, None], torch.sigmoid(last(pixels))

    def gate(self, x: Tensor) -> Tensor:
        channels, pixels = self.gates(x)
        return 1 + channels * pixels

    @takes(x="batch channels height width")
    def forward(self, x: Tensor) -> Tensor:
        channels, pixels = self.gates(x)
        return torch.addcmul(x, x * channels, pixels.to(x.dtype)) if x.dtype == channels.dtype else x + x * channels * pixels

    def products(self, height: int, width: int) -> int:
        """Multiplications, each with its addition, of one map's layers (pooling and the gate's own products apart)."""
        hidden = self.over_channels[0].out_features
        return 2 * self.channels * hidden + height * width * (self.channels + self.kernel**2)  # type: ignore[operator, return-value]


class NonLocal(nn.Module):
    """What the block is held against: x + BN(W softmax(theta^T phi) g) with all pixels as keys, C/2 channels inside (Wang et al., 2018)."""

    def __init__(self, channels: int):
        super().__init__()
        half = narrowed(channels, 2)
        self.theta, self.phi, self.g = (nn.Conv2d(channels, half, 1) for _ in range(3))
        self.out = nn.Sequential(nn.Conv2d(half, channels, 1), BatchNorm(channels))
        nn.init.zeros_(self.out[1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.g))
        return x + self.out((v @ torch.softmax(q.mT @ k, -1).mT).unflatten(-1, x.shape[2:]))  # type: ignore[no-any-return]


class Placement(NamedTuple):
    """slots: where the block stands; score and latency as measured."""

    slots: tuple[int, ...]
    score: float
    latency: float


def pareto(found: Sequence[Placement]) -> list[Placement]:
    """Those that no other beats in one of score and latency and equals or beats in the other, by latency."""
    best: list[Placement] = []
    for one in sorted(found, key=lambda p: (p.latency, -p.score, len(p.slots))):
        if not best or one.score > best[-1].score:
            best.append(one)
    return best


def placement_search(
    make: Callable[[tuple[int, ...]], nn.Module],
    slots: int,
    score: Callable[[nn.Module], float],
    latency: Callable[[nn.Module], float],
    budget: float = float("inf"),
    exhaustive: int = 8,
) -> list[Placement]:
    """The Pareto set of placements within `budget` of latency.

    make(slots in use) -> the model; score: higher is better; latency: lower is. Up to `exhaustive` slots all subsets are tried; beyond that the best
    slot is added again and again, as long as the budget allows.
    """
    if slots < 0:
        raise RegardError(f"slots={slots}; expected 0 or more")

    def measured(chosen: tuple[int, ...]) -> Placement:
        model = make(chosen)
        return Placement(chosen, float(score(model)), float(latency(model)))

    if slots <= exhaustive:
        tried = [measured(c) for n in range(slots + 1) for c in itertools.combinations(range(slots), n)]
        return pareto([one for one in tried if one.latency <= budget])
    tried = [measured(())]
    chosen: tuple[int, ...] = ()
    while len(chosen) < slots:
        step = [measured(tuple(sorted((*chosen, at)))) for at in range(slots) if at not in chosen]
        tried += step
        inside = [one for one in step if one.latency <= budget]
        if not inside:
            break
        chosen = max(inside, key=lambda one: (one.score, -one.latency)).slots
    return pareto([one for one in tried if one.latency <= budget])


@torch.no_grad()
def seconds(model: nn.Module, shape: Sequence[int], runs: int = 30) -> float:
    """The median time of a call on random x of `shape`, after three calls to warm up."""
    x, found = torch.randn(*shape), []
    for at in range(runs + 3):
        start = time.perf_counter()
        model(x)
        if at >= 3:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def latency_overhead(block: nn.Module, base: nn.Module, shape: Sequence[int], runs: int = 30) -> float:
    """Time of `block` over that of `base`, the layer it stands behind, on x of one shape, both in evaluation mode."""
    return seconds(block.eval(), shape, runs) / seconds(base.eval(), shape, runs)
