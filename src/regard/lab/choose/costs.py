"""What a mechanism costs here, in a layer of the asked shape: measured at short lengths and drawn out to the asked context."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compare.config import layer_of
from ..memory import peak_bytes
from .needs import Needs

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
STEEPEST = 2.0  # no cost of attention grows faster than the square of the length


@dataclass(frozen=True)
class Cost:
    """Of all layers and sequences at the asked context. seconds: of a prompt; token: of one token after it; kept: bytes between tokens;
    work: most bytes of one layer's tensors during the prompt. measured: the longest length that was run; beyond it numbers are drawn out."""

    seconds: float
    token: float
    kept: float
    work: float
    measured: int

    @property
    def bytes(self) -> float:
        return self.kept + self.work


def drawn_out(points: dict[int, float], context: int) -> float:
    """A power law through the last two lengths, at the context; flat where the cost fell."""
    (a, low), (b, high) = sorted(points.items())[-2:] if len(points) > 1 else [*points.items()] * 2
    if context == b or a == b or low <= 0:
        return high
    slope = min(STEEPEST, max(0.0, math.log(high / low) / math.log(b / a)))
    return float(high * (context / b) ** slope)


def line_out(points: dict[int, float], context: int) -> float:
    """A line through the last two lengths, at the context: what caches and states are."""
    (a, low), (b, high) = sorted(points.items())[-2:] if len(points) > 1 else [*points.items()] * 2
    return high if a == b else max(high, high + (high - low) / (b - a) * (context - b))


def synced(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def cost(spec: str, needs: Needs, seconds: float) -> Cost:
    """The cost of a mechanism with its own settings, of at most about `seconds` of measuring; the first two lengths are always run."""
    torch.manual_seed(0)
    layer: Any = layer_of(spec, needs.dim, needs.heads, context_len=needs.context).eval().to(needs.device)
    prompt: dict[int, float] = {}
    token: dict[int, float] = {}
    kept: dict[int, float] = {}
    work: dict[int, float] = {}
    lengths = [n for n in LENGTHS if n < needs.context][: len(LENGTHS)] + [needs.context] * (needs.context <= LENGTHS[-1])
    start = time.perf_counter()
    layer(torch.randn(needs.batch, min(64, needs.context), needs.dim, device=needs.device))  # what is met for the first time
    for count, length in enumerate(lengths):
        began = time.perf_counter()
        x: Tensor = torch.randn(needs.batch, length, needs.dim, device=needs.device)
        prompt[length] = statistics.median(timed(lambda x=x: layer(x), needs.device) for _ in range(3))  # type: ignore[misc]
        work[length] = peak_bytes(lambda x=x: layer(x))  # type: ignore[misc]
        _, state = layer.step(x)
        kept[length] = state.bytes
        times = []
        for _ in range(6):
            at = synced(needs.device)
            _, state = layer.step(x[:, :1], state)
            times.append(synced(needs.device) - at)
        token[length] = statistics.median(times[1:])
        now = time.perf_counter()
        if count and now - start + 3 * (now - began) > seconds:
            break
    return Cost(
        needs.layers * drawn_out(prompt, needs.context),
        needs.layers * drawn_out(token, needs.context),
        needs.layers * line_out(kept, needs.context),
        drawn_out(work, needs.context),
        max(prompt),
    )


def timed(run: Any, device: str) -> float:
    start = synced(device)
    run()
    return synced(device) - start
