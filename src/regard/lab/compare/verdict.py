"""One paragraph computed from the numbers of a report: winners are named where intervals separate, and nowhere else."""

from __future__ import annotations

from typing import Any

from .statistics import Estimate, apart, curve, measure

LEARNED_BITS, LEARNED_RECALL = 3.6, 0.9  # what the best must reach before a comparison says anything


def rank(found: dict[str, Estimate], low: bool = True) -> list[str]:
    return sorted(found, key=lambda name: found[name].mean if low else -found[name].mean)


def told(what: str, found: dict[str, Estimate], low: bool, form: str) -> str:
    """Who is best, if the intervals tell."""
    order = rank(found, low)
    first = order[0]
    if len(order) == 1:
        return f"{what}: {first} {found[first].text(form)}."
    shown = {name: format(found[name].mean, form) for name in order}  # a difference that is not shown is none
    same = [name for name in order[1:] if shown[name] == shown[first] or not apart(found[first], found[name])]
    worse = [name for name in order[1:] if name not in same]
    if not worse:
        return f"{what}: no difference seen ({first} {found[first].text(form)}, {order[-1]} {found[order[-1]].text(form)})."
    best = first if not same else f"{first} (with {' and '.join(same)} not told apart from it)"
    return f"{what}: {best} is best, {found[first].text(form)}; behind it {', '.join(f'{n} {found[n].text(form)}' for n in worse)}."


def hardest(results: dict[str, Any], task: str) -> tuple[str, dict[str, Estimate]]:
    """The largest number of a synthetic task, and every mechanism's accuracy there."""
    curves = {name: dict(curve(one, task, "accuracy")) for name, one in results.items()}
    most = max((n for found in curves.values() for n in found), default=0.0)
    return f"{most:g}", {name: found[most] for name, found in curves.items() if most in found}


def too_little(results: dict[str, Any]) -> str:
    """Said first where nobody learned what can be learned: then no difference means anything."""
    bits = [value.mean for one in results.values() if (value := measure(one, "language", "bits", "1"))]
    first = [found[0][1].mean for one in results.values() if (found := curve(one, "recall", "accuracy"))]
    short = []
    if bits and min(bits) > LEARNED_BITS:
        short.append(f"no mechanism came below {LEARNED_BITS} bits per byte (best {min(bits):.2f})")
    if first and max(first) < LEARNED_RECALL:
        short.append(f"none recalled {LEARNED_RECALL:.0%} of the fewest pairs (best {max(first):.0%})")
    return f"Too little training to compare: {' and '.join(short)}; give it more --minutes, or fewer mechanisms." if short else ""


def verdict(report: dict[str, Any]) -> str:
    """What the numbers say, and only that; parts that were not measured are left out."""
    results = report["mechanisms"]
    said = [too_little(results)]
    failed = [
        f"{name} failed at {task} ({run['error']})."
        for name, one in results.items()
        for task in ("language", "recall", "copying")
        for run in list(one.get(task, {}).values())[:1]
        if "error" in run
    ]
    said += failed
    diverged = [
        name
        for name, one in results.items()
        if any("error" not in run for run in one.get("language", {}).values()) and measure(one, "language", "bits", "1") is None
    ]
    if diverged:
        said.append(f"{' and '.join(diverged)} diverged: the loss is no number.")
    bits = {name: value for name, one in results.items() if (value := measure(one, "language", "bits", "1"))}
    if bits:
        tokens = report["steps"]["language"] * report["config"]["batch"] * report["config"]["seq_len"]
        said.append(told(f"Bits per held-out byte after {tokens:,} bytes", bits, True, ".3f"))
        growth = {
            name: Estimate(far.mean - bits[name].mean, None, 1)
            for name in bits
            if (far := measure(results[name], "language", "bits", "4")) is not None
        }
        if growth:
            best, worst = rank(growth)[0], rank(growth)[-1]
            more = f", {worst} by {growth[worst].mean:+.3f}" if worst != best else ""
            said.append(f"At four times the training length {best} changes by {growth[best].mean:+.3f} bits per byte{more}.")
    for task, what in (("recall", "key-value pairs recalled"), ("copying", "tokens copied")):
        most, found = hardest(results, task)
        if found:
            said.append(told(f"Of {most} {what}", found, False, ".0%"))
    speeds = {name: one["speed"]["ratio"] for name, one in results.items() if "speed" in one}
    if speeds:
        longest = max(next(iter(speeds.values()))["prefill"], key=int)
        fast = min(speeds, key=lambda n: speeds[n]["prefill"][longest])
        small = min(speeds, key=lambda n: speeds[n]["state"][longest])
        said.append(
            f"On {longest} tokens {fast} reads a prompt fastest, {1 / speeds[fast]['prefill'][longest]:.1f}x softmax's speed on this machine, "
            f"and {small} keeps the least between tokens, {speeds[small]['state'][longest]:.2%} of softmax's cache."
        )
    said = [part for part in said if part]
    if not said:
        return "Nothing was finished."
    seeds = max((len(one.get("language", {})) for one in results.values()), default=0)
    closing = (
        "Small models; ± is the 95% interval over seeds." if seeds > 1 else "Small models and one seed: no difference is told from chance."
    )
    return " ".join([*said, closing])
