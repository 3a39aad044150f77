"""The ranking: what fits in memory, by quality; those that the study does not tell apart from the best, by what they cost here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ...errors import RegardError
from ...nn.mixers import parsed
from ..compare.statistics import Estimate, apart
from ..compare.study import MEASURES, Study, read
from .costs import Cost, cost
from .needs import Needs


@dataclass(frozen=True)
class Row:
    """A mechanism: its quality in the study, its cost here, where it stands in a word, and why."""

    spec: str
    quality: Estimate
    cost: Cost
    fits: bool
    equal: bool
    standing: str
    why: str

    @property
    def name(self) -> str:
        """The mechanism with its own settings, which are those whose cost was measured."""
        return parsed(self.spec)[0]

    def request(self, needs: Needs) -> float:
        """Seconds of a prompt and its answer."""
        return self.cost.seconds + needs.answer * self.cost.token


@dataclass(frozen=True)
class Choice:
    """rows: the best first. left_out: mechanisms whose costs were not measured, for want of time or since they failed, and why."""

    needs: Needs
    study: Study
    rows: list[Row]
    left_out: dict[str, str]

    @property
    def verdict(self) -> str:
        first = next((row for row in self.rows if row.fits), None)
        if first is None:
            return f"Nothing that was measured fits into {size(self.needs.memory or 0)}; the least needs {size(self.least)}."
        what = MEASURES[self.needs.task][2]
        same = [row.name for row in self.rows if row.equal and row.fits and row is not first]
        beside = f"; {len(same)} others are not told apart from the best, and cost more here ({', '.join(same[:4])})" if same else ""
        out = [row.name for row in self.rows if not row.fits]
        left = f" {len(out)} do not fit, {', '.join(out[:4])} among them." if out else ""
        return (
            f"{first.name}: {told(first.quality, self.needs.task)} {what} in the study{beside}. On this machine a prompt of "
            f"{self.needs.context:,} tokens and {self.needs.answer} tokens after it take {short(first.request(self.needs))} s and "
            f"{size(first.cost.bytes)}.{left}"
        )

    @property
    def least(self) -> float:
        return min((row.cost.bytes for row in self.rows), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        rows = [
            {
                "mechanism": row.name,
                "studied_as": row.spec,
                "quality": row.quality.mean,
                "half_interval": row.quality.half,
                "seeds": row.quality.count,
                "fits": row.fits,
                "told_apart_from_best": not row.equal,
                "cost": {**vars(row.cost), "request_seconds": row.request(self.needs)},
                "standing": row.standing,
                "why": row.why,
            }
            for row in self.rows
        ]
        return {
            "needs": self.needs.as_dict(),
            "study": self.study.told,
            "verdict": self.verdict,
            "rows": rows,
            "left_out": self.left_out,
        }


def told(found: Estimate, task: str) -> str:
    return found.text(".3f" if MEASURES[task][1] else ".0%")


def short(x: float) -> str:
    """Three digits, or all before the point."""
    return f"{x:.3g}" if x < 100 else f"{x:,.0f}"


def size(n: float) -> str:
    for letter, unit in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= unit:
            return f"{short(n / unit)} {letter}"
    return f"{n:.0f} bytes"


def choose(needs: Needs, study: Study | None = None, tick: Callable[[float, str], None] = lambda share, name: None) -> Choice:
    """Rank the study's mechanisms for `needs`. Costs are measured best quality first, as long as needs.minutes last."""
    study = study or read()
    quality = study.quality(needs.task)
    if needs.among:
        known = {parsed(spec)[0]: spec for spec in quality}
        for name in needs.among:
            if name not in known:
                raise RegardError(f"--among {name!r}: not in the study; it has {', '.join(sorted(known))}")
        quality = {known[name]: quality[known[name]] for name in needs.among}
    low = MEASURES[needs.task][1]
    order = sorted(quality, key=lambda spec: quality[spec].mean if low else -quality[spec].mean)
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    start, budget = time.perf_counter(), 60 * needs.minutes
    for at, spec in enumerate(order):
        name, gone = parsed(spec)[0], time.perf_counter() - start
        tick(min(1.0, gone / budget), name)
        if at and gone > budget:
            left_out |= {parsed(one)[0]: "the minutes were over" for one in order[at:]}
            break
        try:
            found = cost(name, needs, max(0.5, (budget - gone) / (len(order) - at)))
        except Exception as why:  # a shape that this mechanism does not take, or memory that ran out
            left_out[name] = f"{type(why).__name__}: {why}".splitlines()[0]
            continue
        rows.append(Row(spec, quality[spec], found, needs.memory is None or found.bytes <= needs.memory, False, "", ""))
    return Choice(needs, study, ranked(rows, needs), left_out)


def ranked(rows: list[Row], needs: Needs) -> list[Row]:
    """The rows in order, each with its reason. rows: by quality."""
    best = next((row for row in rows if row.fits), None)
    equal = [row for row in rows if row.fits and best is not None and (row is best or not apart(row.quality, best.quality))]
    if best is not None and best.quality.half is None:
        equal = [best]  # one seed each tells no interval: order by the mean alone
    first = sorted(equal, key=lambda row: row.request(needs))
    behind = [row for row in rows if row.fits and row not in equal]
    out = [row for row in rows if not row.fits]
    return (
        [
            stood(row, needs, "best" if row is best else "as good", "the best mean" if row is best else "not told apart from the best")
            for row in first
        ]
        + [stood(row, needs, "behind", "behind the best") for row in behind]
        + [stood(row, needs, "too large", f"needs {size(row.cost.bytes)} of {size(needs.memory or 0)}") for row in out]
    )


def stood(row: Row, needs: Needs, standing: str, why: str) -> Row:
    """The row with its standing and its reasons."""
    far = "" if row.cost.measured >= needs.context else f", drawn out from {row.cost.measured:,} tokens"
    cut = "" if row.spec == row.name else f"; studied with {row.spec.partition(':')[2]}"
    why = f"{why}; {short(row.request(needs))} s a request{far}{cut}"
    return replace(row, equal=standing in ("best", "as good"), standing=standing, why=why)
