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
PROMPT, TOKEN = (1.0, 2.0), (0.0, 1.0)  # the powers of the length between which costs of a prompt and of a token after it grow


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


def ends(points: dict[int, float]) -> tuple[tuple[int, float], tuple[int, float]]:
    """The last length and one a little before it, far enough away for noise not to tilt what is drawn through both."""
    found = sorted(points.items())
    return found[max(0, len(found) - 3)], found[-1]


def drawn_out(points: dict[int, float], context: int, powers: tuple[float, float]) -> float:
    """A power law through the longest lengths, at the context; its power lies between the two given."""
    (a, low), (b, high) = ends(points)
    if context == b or a == b or low <= 0:
        return high
    slope = min(powers[1], max(powers[0], math.log(high / low) / math.log(b / a)))
    return float(high * (context / b) ** slope)


def line_out(points: dict[int, float], context: int) -> float:
    """A line through the longest lengths, at the context: what caches and states are."""
    (a, low), (b, high) = ends(points)
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
    lengths = [n for n in LENGTHS if n < needs.context] + [needs.context] * (needs.context <= LENGTHS[-1])
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
    stays = line_out(kept, needs.context)
    return Cost(
        needs.layers * drawn_out(prompt, needs.context, PROMPT),
        needs.layers
        * min(drawn_out(token, needs.context, TOKEN), token[max(token)] * stays / kept[max(kept)]),  # a token reads what is kept
        needs.layers * stays,
        drawn_out(work, needs.context, PROMPT),
        max(prompt),
    )


def timed(run: Any, device: str) -> float:
    start = synced(device)
    run()
    return synced(device) - start
