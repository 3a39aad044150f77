"""Tiny models that must have learned their task before anything is read off them."""

from __future__ import annotations

from collections.abc import Sequence

from regard.errors import RegardError
from regard.zoo.softmax.attention_sink import SinkResult


def learned(runs: Sequence[SinkResult], least: float = 0.95) -> Sequence[SinkResult]:
    """The runs, if each copies rightly in at least that share of cases; else the check fails and says what was reached."""
    worst = min(run.accuracy for run in runs)
    if worst < least:
        raise RegardError(f"the task was not learned: {worst:.3f} of the copies are right, expected at least {least}")
    return runs
