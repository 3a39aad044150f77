"""`regard verify`: every working row's claims, measured on the subject and on a control that must fail."""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..catalog import Record, entry, records
from ..catalog.registry import entries
from ..errors import RegardError

Measure = Callable[[], tuple[float, float]]


@dataclass(frozen=True)
class Check:
    """One claim of a row. `measure()` gives (the number on the subject, the same number on the control).

    side "below": the subject must be <= threshold and the control above it; "above": the subject >= threshold, the control below.
    control: what the control is, in words.
    """

    slug: str
    claim: str
    threshold: float
    side: str
    control: str
    measure: Measure


@dataclass(frozen=True)
class Result:
    """A check that was run. control is a number and what it was measured on; verdict is "pass" or says what failed."""

    claim: str
    measured: float
    threshold: str
    control: str
    verdict: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.verdict == "pass"


_checks: dict[str, list[Check]] = {}


def check(slug: str, claim: str, *, below: float | None = None, above: float | None = None, control: str) -> Callable[[Measure], Measure]:
    """Decorator: a check of a row. Exactly one of `below` and `above` is the threshold."""
    if (below is None) == (above is None):
        raise RegardError(f"check of {slug!r}: expected exactly one of below and above")

    def put(measure: Measure) -> Measure:
        threshold = below if below is not None else above
        assert threshold is not None
        _checks.setdefault(slug, []).append(Check(slug, claim, threshold, "below" if below is not None else "above", control, measure))
        return measure

    return put


def home(slug: str) -> str | None:
    """The module of a working row's checks, regard.lab.checks.<family>.<slug>; None for other names."""
    found = entries().get(slug)
    if found is None or not found.module.startswith("regard.zoo."):
        return None
    name = found.module.replace("regard.zoo.", "regard.lab.checks.", 1)
    return name if importlib.util.find_spec(name) else None


def checks_of(slug: str) -> list[Check]:
    """The checks of a row, in order; only its own file of checks is imported."""
    file = home(slug)
    if file is not None:
        importlib.import_module(file)
    return list(_checks.get(slug, []))


def run(one: Check) -> Result:
    """Run a check; a control that falls on the subject's side makes it fail, for then it proves nothing."""
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        measured, control = map(float, one.measure())
        verdict = judge(one, measured, control)
    except Exception as why:
        measured = control = math.nan
        verdict = f"error: {type(why).__name__}: {why}"
    sign = "<=" if one.side == "below" else ">="
    return Result(one.claim, measured, f"{sign} {one.threshold:g}", f"{control:.4g} ({one.control})", verdict, time.perf_counter() - start)


def judge(one: Check, measured: float, control: float) -> str:
    def good(x: float) -> bool:
        return math.isfinite(x) and (x <= one.threshold if one.side == "below" else x >= one.threshold)

    if not good(measured):
        return "fail: the subject is on the wrong side"
    if not math.isfinite(control):
        return "fail: the control is no number, so it proves nothing"
    return "fail: the control passes too" if good(control) else "pass"


def rows(names: Iterable[str], family: str | None) -> list[Record]:
    """The working rows to verify; names must be working rows."""
    chosen = list(dict.fromkeys(names))
    known = {record.slug: record for record in records(family)}
    for name in chosen:
        entry(name)  # says what is wrong with a name that is no working row
        if name not in known:
            raise RegardError(f"{name!r} is not a row of {'family ' + family if family else 'the catalogue'} with checks of its own")
    return [record for record in known.values() if record.status == "works" and (not chosen or record.slug in chosen)]


def verify(names: Iterable[str] = (), family: str | None = None) -> Iterator[tuple[Record, list[Result]]]:
    """Run the checks of working rows, a row at a time. A working row without checks fails."""
    for record in rows(names, family):
        results = [run(one) for one in checks_of(record.slug)]
        yield record, results or [Result("the row has checks", 0, ">= 1", "none", "fail: no checks", 0.0)]


def report(done: list[tuple[Record, list[Result]]], family: str | None) -> dict[str, Any]:
    """The JSON form. works counts rows whose every check passed; failed the other working rows that were run; planned the planned ones."""
    failed = sum(any(not result.passed for result in results) for _, results in done)
    listed = [
        {
            "id": record.id,
            "slug": record.slug,
            "family": record.family,
            "status": record.status,
            "checks": [{key: finite(value) for key, value in asdict(result).items() if key != "seconds"} for result in results],
        }
        for record, results in done
    ]
    planned = len(records(family, "planned"))
    return {"rows": listed, "summary": {"works": len(done) - failed, "planned": planned, "failed": failed}}


def finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
