"""What a benchmark of attention patterns makes of its measurements: index, efficiency length, correlation, benefit, and one table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import torch

from ..errors import RegardError
from ..plots import Plot, figure
from ..results import Column, Result

Higher = Mapping[tuple[str, str], bool]  # (task, measure) -> whether more is better
Scores = Mapping[str, Mapping[str, Mapping[str, float]]]  # method -> task -> measure -> value


def compositional_index(
    scores: Scores, higher: Higher, norms: Mapping[tuple[str, str], tuple[float, float]] | None = None
) -> dict[str, float]:
    """method -> index within one pattern. higher: (task, measure) -> whether more is better. norms: (mu, sigma) of each (None: of these methods, sigma
    over all of them; a measure in which all are equal counts 0)."""
    found = {}
    for method, own in scores.items():
        means = []
        for task, measures in own.items():
            z = []
            for name, x in measures.items():
                values = [other[task][name] for other in scores.values() if task in other]
                if not all(map(math.isfinite, values)):
                    raise RegardError(f"{task} {name}: {values} of {', '.join(scores)}; expected finite numbers")
                mu, sigma = (statistics.fmean(values), statistics.pstdev(values)) if norms is None else norms[task, name]
                z.append((1 if higher[task, name] else -1) * (x - mu) / sigma if sigma else 0.0)
            means.append(statistics.fmean(z))
        if means:
            found[method] = statistics.fmean(means)
    return found


def efficiency_length(lengths: Sequence[float], vanilla: Sequence[float], other: Sequence[float], skip: int = 0) -> float | None:
    """The length from which `other`, linear, costs less than `vanilla`, quadratic, by least squares; None: their costs never cross so. skip: of the
    shortest lengths, how many the line leaves out. Below the shortest length (or 0): cheaper from the start."""
    if not len(lengths) == len(vanilla) == len(other) or len(set(lengths)) < 3 or len(set(lengths[skip:])) < 2:
        raise RegardError(f"{len(lengths)} lengths, {len(vanilla)} and {len(other)} costs, skip={skip}; expected three or more of each")
    n, f, g = (torch.tensor(list(x), dtype=torch.float64) for x in (lengths, vanilla, other))
    if not all(bool(x.isfinite().all()) for x in (n, f, g)):
        raise RegardError("lengths and costs have numbers that are not finite; expected measured ones")
    top = n.max()
    powers = (n / top)[:, None] ** torch.arange(3)
    c, b, a = torch.linalg.lstsq(powers, f[:, None]).solution[:, 0].tolist()
    e, d = torch.linalg.lstsq(powers[skip:, :2], g[skip:, None]).solution[:, 0].tolist()
    if abs(a) <= 1e-12 * float(f.abs().max()):  # a line too
        return (e - c) / (b - d) * float(top) if b > d else None
    inside = (b - d) ** 2 - 4 * a * (c - e)
    return (d - b + math.sqrt(inside)) / (2 * a) * float(top) if a > 0 and inside >= 0 else None


def pattern_correlation(index: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
    """Pearson correlations of two patterns' indices (pattern -> method -> index) over the methods of both; None below three, or where all are equal."""
    found: dict[str, float | None] = {}
    for a, b in combinations(index, 2):
        shared = [method for method in index[a] if method in index[b]]
        x, y = ([index[p][method] for method in shared] for p in (a, b))
        varied = len(shared) > 2 and len(set(x)) > 1 and len(set(y)) > 1
        found[f"{a} / {b}"] = statistics.correlation(x, y) if varied else None
    return found


def benefit(
    own: Mapping[str, Mapping[str, float]], without: Mapping[str, Mapping[str, float]], higher: Higher
) -> dict[str, dict[str, float]]:
    """task -> measure -> how much better a net is than the one whose attention is removed, in the measure's units; below 0: worse."""
    return {
        task: {name: (1 if higher[task, name] else -1) * (x - without[task][name]) for name, x in measures.items()}
        for task, measures in own.items()
    }


@dataclass
class PatternReport(Result):
    """refused: method -> pattern -> why. scores and benefit: method -> pattern -> task -> measure -> number; scores hold "none" too, the net without
    attention. index: pattern -> method -> number. perplexity: method -> length -> number. correlation: "a / b" -> number or None. efficiency:
    method -> "time", "memory" -> length in tokens or None."""

    refused: dict[str, dict[str, str]]
    scores: dict[str, dict[str, dict[str, dict[str, float]]]] = field(default_factory=dict)
    index: dict[str, dict[str, float]] = field(default_factory=dict)
    benefit: dict[str, dict[str, dict[str, dict[str, float]]]] = field(default_factory=dict)
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    correlation: dict[str, float | None] = field(default_factory=dict)
    efficiency: dict[str, dict[str, float | None]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def columns(self) -> dict[str, Column]:
        """A row a method; NaN: refused or not measured; an efficiency length of inf: never cheaper."""
        lengths = list(next(iter(self.perplexity.values()), {}))
        found: dict[str, Column] = {"method": list(self.refused)}
        found |= {f"index, {pattern}": [own.get(m, math.nan) for m in self.refused] for pattern, own in self.index.items()}
        for kind in ("time", "memory"):
            own = [self.efficiency.get(m, {}).get(kind, math.nan) for m in self.refused]
            found[f"n* {kind}"] = [math.inf if x is None else x for x in own]
        return found | {f"perplexity, {n} tokens": [self.perplexity.get(m, {}).get(n, math.nan) for m in self.refused] for n in lengths}

    def plot(self) -> Plot:
        """Perplexity by length."""
        lines = {method: [(float(n), x) for n, x in own.items()] for method, own in self.perplexity.items()}
        return figure("Language by length", "tokens", "perplexity", lines, log_x=True)

    def __rich__(self) -> Any:
        """A row a method: index in each pattern ("-": refused), efficiency lengths, and perplexities from half to four times the trained length."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        lengths = list(next(iter(self.perplexity.values()), {}))
        costs = [kind for kind in ("time", "memory") if any(kind in own for own in self.efficiency.values())]
        initials = ["".join(word[0] for word in pattern.split()).upper() for pattern in self.index]
        said = ", ".join(f"{short} {pattern}" for short, pattern in zip(initials, self.index, strict=True))
        heads = (*initials, *(f"n* {kind[:3]}" for kind in costs), *(f"ppl {n}" for n in lengths))
        table = Table(
            "method",
            *heads,
            title="Attention in four patterns",
            box=SIMPLE_HEAD,
            padding=0,
            caption=f"index in {said} (-: refused); n*: cheaper than vanilla from",
        )
        for method in self.refused:
            row = [f"{own[method]:+.2f}" if method in own else "-" for own in self.index.values()]
            row += [told(self.efficiency[method][kind]) if kind in self.efficiency.get(method, {}) else "-" for kind in costs]
            row += [f"{self.perplexity[method][n]:.1f}" if method in self.perplexity else "-" for n in lengths]
            table.add_row(method, *row)
        return table

    def refusals(self) -> list[str]:
        """A line for each method and reason: the patterns it does not run in."""
        found = []
        for method, own in self.refused.items():
            for why in dict.fromkeys(own.values()):
                found.append(f"{method}: not {', '.join(p for p, reason in own.items() if reason == why)}: {why}")
        return found


def told(length: float | None) -> str:
    return "never" if length is None else f"{max(0.0, length):.0f}"
