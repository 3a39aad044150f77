"""What seeds say together: a mean, and how sure it is."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

# The two-sided 95% points of Student's t by degrees of freedom; beyond them the last is close enough.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Estimate:
    """The mean of `count` seeds and half its 95% interval (None: one seed tells no interval)."""

    mean: float
    half: float | None
    count: int

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)

    def text(self, form: str = ".3f") -> str:
        return format(self.mean, form) + ("" if self.half is None else f" ± {format(self.half, form)}")


def estimate(values: list[float]) -> Estimate | None:
    """None where nothing was measured, or something is no number."""
    if not values or not all(map(math.isfinite, values)):
        return None
    if len(values) == 1:
        return Estimate(values[0], None, 1)
    half = STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.mean(values), half, len(values))


def apart(a: Estimate, b: Estimate) -> bool:
    """Whether two intervals do not touch; one seed separates nothing."""
    return a.half is not None and b.half is not None and (a.high < b.low or b.high < a.low)


def seeds_of(one: dict[str, Any], task: str) -> list[dict[str, Any]]:
    """The finished runs of a task."""
    return [run for run in one.get(task, {}).values() if "error" not in run]


def measure(one: dict[str, Any], task: str, *path: str) -> Estimate | None:
    """A number of a task's runs, over seeds: measure(one, "language", "bits", "1")."""
    values = []
    for run in seeds_of(one, task):
        found: Any = run
        for key in path:
            found = found[key]
        if found is None:
            return None
        values.append(float(found))
    return estimate(values)


def curve(one: dict[str, Any], task: str, key: str) -> list[tuple[float, Estimate]]:
    """A measure that stands at several numbers, "4", "8", ...: (number, estimate)."""
    at = sorted({n for run in seeds_of(one, task) for n in run[key]}, key=float)
    found = [(float(n), measure(one, task, key, n)) for n in at]
    return [(n, value) for n, value in found if value is not None]
