"""The shipped study: what `benchmarks/study.py` trained, read with the estimates that a ranking needs."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import RegardError
from .statistics import Estimate, measure, seeds_of

# task of a choice -> (what is read from the runs, whether less is better, what it is called)
MEASURES: dict[str, tuple[tuple[str, ...], bool, str]] = {
    "text": (("language", "bits", "1"), True, "bits per byte"),
    "long-text": (("language", "bits", "4"), True, "bits per byte at 4 times the training length"),
    "recall": (("recall", "accuracy", "16"), False, "of 16 pairs recalled"),
}
SHIPPED = Path(__file__).with_name("study.json")
NORMAL = 1.96  # the two-sided 95% point: the pooled spread has dozens of degrees of freedom


@dataclass(frozen=True)
class Study:
    """Runs of many mechanisms in the same small model: found["mechanisms"][spec][task][seed]."""

    found: dict[str, Any]

    @property
    def specs(self) -> list[str]:
        """Settings with a finished run of every task."""
        return [spec for spec, one in self.found["mechanisms"].items() if all(seeds_of(one, task) for task in self.found["steps"])]

    @cached_property
    def told(self) -> str:
        """What was trained, in one line."""
        s, steps = self.found["settings"], self.found["steps"]
        return (
            f"{len(self.specs)} mechanisms in {s['layers']} layers of {s['dim']} channels, {s['seq_len']} tokens, "
            f"{' and '.join(f'{n} steps of {task}' for task, n in steps.items())}, PyTorch {self.found['versions']['torch']}"
        )

    def quality(self, task: str) -> dict[str, Estimate]:
        """Each mechanism's mean over its seeds, with an interval from the spread of seeds pooled over all mechanisms: few seeds each tell
        little of their own. Runs that diverged are left out."""
        path, _, _ = MEASURES[task]
        raw = {spec: measure(self.found["mechanisms"][spec], *path) for spec in self.specs}
        values = {spec: self.values(spec, path) for spec, value in raw.items() if value is not None}
        squares = [(statistics.variance(x), len(x) - 1) for x in values.values() if len(x) > 1]
        freedom = sum(n for _, n in squares)
        spread = math.sqrt(sum(v * n for v, n in squares) / freedom) if freedom else None
        return {
            spec: Estimate(statistics.mean(x), None if spread is None else NORMAL * spread / math.sqrt(len(x)), len(x))
            for spec, x in values.items()
        }

    def values(self, spec: str, path: tuple[str, ...]) -> list[float]:
        task, *keys = path
        found = []
        for run in seeds_of(self.found["mechanisms"][spec], task):
            value: Any = run
            for key in keys:
                value = value[key]
            found.append(float(value))
        return found


def read(path: Path = SHIPPED) -> Study:
    """The study in a file of `benchmarks/study.py`; RegardError if it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        study = Study(found)
        assert study.specs and study.told
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as why:
        raise RegardError(f"study {str(path)!r}: expected a JSON file made by benchmarks/study.py ({type(why).__name__})") from None
    return study
