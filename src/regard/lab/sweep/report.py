"""A sweep as a table in Markdown, plots, and JSON."""

from __future__ import annotations

import json
from pathlib import Path

from ...plots import figure
from ..files import prepare, write_text
from .cache import CacheSweep
from .measure import Point, Sweep


def table(result: Sweep) -> str:
    """A row a point, sparser ones last within a method."""
    depths = result.config.depths
    head = ["method", "settings", "density", "bits a byte", "needles", *[f"at {d:g}" for d in depths], "prefill / softmax"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for p in ordered(result.points):
        cells = [f"`{p.name}`", p.settings.replace(",", ", "), f"{p.density:.3f}", f"{p.bits_per_byte:.3f}", f"{p.found:.2f}"]
        cells += [f"{p.retrieval[d]:.2f}" for d in depths] + [f"{p.prefill:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ordered(points: list[Point]) -> list[Point]:
    names = list(dict.fromkeys(p.name for p in points))
    return sorted(points, key=lambda p: (names.index(p.name), -p.density))


def plots(result: Sweep) -> dict[str, str]:
    """SVG text by file name: bits per byte, needles found, and prefill time against density."""
    measures = {
        "bits": ("bits per byte", lambda p: p.bits_per_byte),
        "needles": ("share of needles found", lambda p: p.found),
        "prefill": ("prefill time / softmax", lambda p: p.prefill),
    }
    made: dict[str, str] = {}
    for key, (label, value) in measures.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for p in ordered(result.points):
            lines.setdefault(p.name, []).append((p.density, value(p)))
        made[f"{key}.svg"] = figure(f"{label}, {result.config.length} tokens", "pairs read / causal pairs", label, lines)
    return made


def write_points(result: Sweep | CacheSweep, out: Path) -> None:
    """report.json in `out`: what has been measured so far."""
    prepare(out, f"--out {out}")
    write_text(out / "report.json", json.dumps(result.as_dict(), indent=1) + "\n")


def write(result: Sweep, out: Path) -> None:
    """report.json, table.md and the plots, in `out`."""
    write_points(result, out)
    write_text(out / "table.md", table(result) + "\n")
    for name, svg in plots(result).items():
        write_text(out / name, svg)
