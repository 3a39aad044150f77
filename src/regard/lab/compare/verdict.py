"""One paragraph computed from the numbers of a report."""

from __future__ import annotations

import math
from typing import Any


def best(scores: dict[str, float], low: bool = True) -> tuple[str, float]:
    name = min(scores, key=lambda n: scores[n] if low else -scores[n])
    return name, scores[name]


def finite(scores: dict[str, float]) -> dict[str, float]:
    """Scores that are numbers: a run that diverged is neither best nor worst."""
    return {name: value for name, value in scores.items() if math.isfinite(value)}


def verdict(report: dict[str, Any]) -> str:
    """What the numbers say, and only that; parts that were not measured are left out."""
    results = report["mechanisms"]
    said = []
    bits = {name: one["language"]["valid_bits"]["1"] for name, one in results.items() if "language" in one}
    diverged = [name for name, value in bits.items() if not math.isfinite(value)]
    if diverged:
        said.append(f"{' and '.join(diverged)} diverged: the loss is no number.")
    bits = finite(bits)
    if bits:
        name, value = best(bits)
        worst, most = best(bits, low=False)
        tokens = next(one["language"]["tokens"] for one in results.values() if "language" in one)
        spread = f", {worst} the most, {most:.3f}" if len(bits) > 1 else ""
        said.append(f"After {tokens:,} bytes of training, {name} needs the fewest bits per held-out byte, {value:.3f}{spread}.")
        growth = {
            n: one["language"]["valid_bits"]["4"] - one["language"]["valid_bits"]["1"] for n, one in results.items() if "language" in one
        }
        growth = finite(growth)
        if growth:
            name, value = best(growth)
            said.append(
                f"At four times the training length {name} changes by {value:+.3f} bits per byte"
                + (f", {best(growth, low=False)[0]} by {best(growth, low=False)[1]:+.3f}." if len(growth) > 1 else ".")
            )
    recalls = {
        name: sum(one["synthetic"]["recall"].values()) / len(one["synthetic"]["recall"])
        for name, one in results.items()
        if "synthetic" in one
    }
    recalls = finite(recalls)
    copies = finite({n: one["synthetic"]["copying"] for n, one in results.items() if "synthetic" in one})
    if recalls and copies:
        name, value = best(recalls, low=False)
        said.append(
            f"In this budget {name} recalls the most associations ({value:.0%} on average) and {best(copies, low=False)[0]} copies best "
            f"({best(copies, low=False)[1]:.0%})."
        )
    speeds = {name: one["speed"]["ratio"] for name, one in results.items() if "speed" in one}
    if speeds:
        longest = max(next(iter(speeds.values()))["prefill"], key=int)
        name, value = best({n: ratio["prefill"][longest] for n, ratio in speeds.items()})
        said.append(f"On {longest} tokens {name} is the fastest to read a prompt, {1 / value:.1f}x softmax's speed on this machine")
        name, value = best({n: ratio["state"][longest] for n, ratio in speeds.items()})
        said.append(f"and {name} keeps the least between tokens, {value:.2%} of softmax's cache.")
        said[-2:] = [" ".join(said[-2:])]
    if not said:
        return "Nothing was finished."
    return " ".join(said) + " These are small models and one seed: read differences of a few percent as ties."
