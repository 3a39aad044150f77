"""Writes docs/results/weighted.md or recurrent.md from a report of `regard compare`, and for the latter from benchmarks/results/recall.json.

python docs/results.py runs/weighted/report.json weighted > docs/results/weighted.md
python docs/results.py runs/recurrent/report.json recurrent > docs/results/recurrent.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from regard.catalog import records
from regard.lab.compare.statistics import Estimate, curve, measure
from regard.lab.compare.verdict import verdict
from regard.plots import figure


def first_sentence(text: str, limit: int = 200) -> str:
    """The claim up to its first full stop or semicolon, at most `limit` characters."""
    cut = min([at for at in (text.find(". "), text.find("; ")) if at > 0] or [len(text)])
    return (text[:cut] if cut <= limit else text[: limit - 1].rsplit(" ", 1)[0] + " …").replace("|", "/").rstrip(".")


def told(found: Estimate | None, form: str) -> str:
    return "" if found is None else found.text(form)


def row(name: str, one: dict[str, Any], claims: dict[str, str]) -> str:
    recall, copying = curve(one, "recall", "accuracy"), curve(one, "copying", "accuracy")
    cells = [
        f"`{name}`",
        *(told(measure(one, "language", "bits", n), ".3f") for n in "124"),
        told(measure(one, "language", "sink_mass"), ".3f"),
        *(told(found[-1][1] if found else None, ".2f") for found in (recall, copying)),
    ]
    return "| " + " | ".join([*cells, claims.get(name.partition(":")[0], "the baseline")]) + " |"


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    claims = {record.slug: first_sentence(record.claim) for record in records()}
    config, results = report["config"], report["mechanisms"]
    bits = {name: found.mean for name, one in results.items() if (found := measure(one, "language", "bits", "1"))}
    order = sorted(bits, key=lambda name: bits[name])
    kind = sys.argv[2]
    head = f"""# {kind.capitalize()} mechanisms at equal budget

One small byte-level model a mechanism ({config["layers"]} layers, {config["dim"]} channels, {config["heads"]} heads), the same text, {report["rounds"]} seeds, tokens and
{report["steps"]["language"]} steps of {config["batch"]} x {config["seq_len"]} bytes; on {report["environment"]["threads"]} CPU threads. Made by

```
regard compare {" ".join(config["mechanisms"])} --minutes {config["minutes"]:g} --out runs/{kind}
python docs/results.py runs/{kind}/report.json {kind} > docs/results/{kind}.md
```

What this is not: a test of the papers' claims, which are about models a thousand times larger. ± is the 95% interval over seeds; a mechanism whose paper trains it with another recipe (learning rate, norms, length) is not at its best here. The report's
speeds were taken while the machine did other work and are left out; docs/speed.md has speeds.

{verdict({**report, "mechanisms": {name: {part: one[part] for part in one if part != "speed"} for name, one in results.items()}})}

| mechanism | bits a byte | at 2x length | at 4x length | weight on first token | recall | copying | what the paper claims |
|---|---|---|---|---|---|---|---|"""
    foot = """
bits a byte: held-out, at the training length. recall: multi-query associative recall of the most pairs asked for. copying: share of tokens right."""
    sys.stdout.write("\n".join([head, *[row(name, results[name], claims) for name in order], foot]) + "\n")
    if kind == "recurrent":
        sys.stdout.write(recall_section())
        sys.stdout.write(digits_section())


def digits_section() -> str:
    """Accuracy of the vision rows on real images."""
    measured = json.loads(Path("benchmarks/results/digits.json").read_text(encoding="utf-8"))
    rows = [f"| `{name}` | {one['accuracy']:.3f} | {one['parameters']:,} |" for name, one in measured["results"].items()]
    return (
        f"""
## Vision rows on real images

scikit-learn's 8 x 8 digits, 1400 to train on and 397 to test on; a pyramid of two stages (8 x 8, 4 x 4), {measured["steps"]} steps of 64 images each, by
`python benchmarks/digits.py`. One seed; differences of two points are ties. The last line has no blocks at all.

| mechanism | accuracy | parameters |
|---|---|---|
"""
        + "\n".join(rows)
        + "\n"
    )


def recall_section() -> str:
    """Recall against the size of the state, as a table, and a plot beside the page."""
    measured = json.loads(Path("benchmarks/results/recall.json").read_text(encoding="utf-8"))
    lines: dict[str, list[tuple[float, float]]] = {}
    rows = []
    for name, widths in measured["results"].items():
        found = [(one["state"], sum(one["accuracy"].values()) / len(one["accuracy"])) for one in widths.values()]
        lines[name] = sorted(found)
        rows.append(f"| `{name}` | " + " | ".join(f"{share:.2f} ({state:,} B)" for state, share in found) + " |")
    steps = next(iter(next(iter(measured["results"].values())).values()))["steps"]
    plot = figure("Recall and state", "bytes of state a layer", "share of keys answered", lines, log_x=True)
    Path("docs/results/recall.svg").write_text(plot, encoding="utf-8")
    widths = " | ".join(f"{dim} channels" for dim in next(iter(measured["results"].values())))
    bars = "|---" * (1 + widths.count("|") + 1) + "|"
    return (
        f"""
## Recall and the size of the state

Multi-query associative recall (sequences of {measured["length"]} tokens, 4, 8 and 16 pairs), a short convolution and then one layer of one head, {steps} steps each, by
`python benchmarks/recall.py`. The state is that layer's after the sequence; softmax's and local linear attention's grow with its length.

![share of keys answered against bytes of state](recall.svg)

| mechanism | {widths} |
{bars}
"""
        + "\n".join(rows)
        + "\n"
    )


if __name__ == "__main__":
    main()
