"""The cross-entropy method: draw settings, keep the best, move what is drawn from towards them, and again (Rubinstein, 1999)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import RegardError


@dataclass(frozen=True)
class Normal:
    """A number from N(mean, std^2), cut to low .. high; log: its logarithm is drawn so, and mean and std are the logarithm's. whole: rounded."""

    mean: float
    std: float
    low: float = -math.inf
    high: float = math.inf
    log: bool = False
    whole: bool = False

    def draw(self, source: random.Random) -> float:
        x = source.gauss(self.mean, self.std)
        x = min(max(math.exp(x) if self.log else x, self.low), self.high)
        return round(x) if self.whole else x

    def refit(self, elite: list[Any], smoothing: float) -> Normal:
        """The elite's mean and standard deviation, smoothing (new) to 1 - smoothing (old)."""
        found = [math.log(x) for x in elite] if self.log else elite
        mean = math.fsum(found) / len(found)
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in found) / len(found))
        return replace(self, mean=smoothing * mean + (1 - smoothing) * self.mean, std=smoothing * std + (1 - smoothing) * self.std)


@dataclass(frozen=True)
class Choice:
    """One of some options, by their probabilities (None: all alike)."""

    options: tuple[Any, ...]
    probabilities: tuple[float, ...] | None = None

    @property
    def shares(self) -> tuple[float, ...]:
        return self.probabilities or (1 / len(self.options),) * len(self.options)

    def draw(self, source: random.Random) -> Any:
        return source.choices(self.options, self.shares)[0]

    def refit(self, elite: list[Any], smoothing: float) -> Choice:
        shares = [sum(x == option for x in elite) / len(elite) for option in self.options]
        return replace(
            self, probabilities=tuple(smoothing * new + (1 - smoothing) * old for new, old in zip(shares, self.shares, strict=True))
        )


Distribution = Normal | Choice


@dataclass(frozen=True)
class Found:
    """settings: the best that were tried, of this value. space: what was drawn from in the end. thresholds: of each round, the value of its worst elite."""

    settings: dict[str, Any]
    value: float
    space: dict[str, Distribution]
    thresholds: tuple[float, ...]


def cross_entropy(
    cost: Callable[[dict[str, Any]], float],
    space: Mapping[str, Distribution],
    *,
    samples: int = 100,
    elite: float = 0.1,
    smoothing: float = 0.7,
    rounds: int = 30,
    patience: int = 5,
    tolerance: float = 1e-9,
    seed: int = 0,
) -> Found:
    """Settings of small cost: a product of distributions over hyper-parameters, refitted in each round to the best `elite` share of `samples`.

    smoothing: weight of the new fit against the old. Stops when the elite's threshold has not fallen by `tolerance` for `patience` rounds.
    """
    count = math.ceil(elite * samples)
    if not space or not 0 < elite <= 1 or samples < 1 or not 0 < smoothing <= 1 or rounds < 1 or patience < 1:
        raise RegardError(
            f"space of {len(space)}, samples={samples}, elite={elite}, smoothing={smoothing}, rounds={rounds}, patience={patience}: expected at "
            "least one hyper-parameter, positive numbers, and shares in (0, 1]"
        )
    source, now = random.Random(seed), dict(space)
    best: tuple[float, dict[str, Any]] | None = None
    thresholds: list[float] = []
    since = 0
    for _ in range(rounds):
        drawn = [{name: one.draw(source) for name, one in now.items()} for _ in range(samples)]
        tried = [(float(cost(settings)), settings) for settings in drawn]
        wrong = next((settings for value, settings in tried if math.isnan(value)), None)
        if wrong is not None:
            raise RegardError(f"cost of {wrong} is NaN; expected a number, or inf for settings that fail")
        tried.sort(key=lambda pair: pair[0])
        kept = tried[:count]
        best = kept[0] if best is None or kept[0][0] < best[0] else best
        since = 0 if not thresholds or kept[-1][0] < min(thresholds) - tolerance else since + 1
        thresholds.append(kept[-1][0])
        if since >= patience:
            break
        now = {name: one.refit([settings[name] for _, settings in kept], smoothing) for name, one in now.items()}
    assert best is not None
    return Found(best[1], best[0], now, tuple(thresholds))


__all__ = ["Choice", "Found", "Normal", "cross_entropy"]
