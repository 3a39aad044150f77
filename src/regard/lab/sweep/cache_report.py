"""A sweep of caches as a table in Markdown, plots, and JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...plots import figure
from ..files import write_text
from .cache import CachePoint, CacheSweep
from .report import write_points


def cache_line(p: CachePoint) -> str:
    """A point in a line of a terminal."""
    return (
        f"{p.name:18} kept {p.kept:.3f}  bits/byte {p.bits_per_byte:.3f}  same token {p.agreement:.2f}  KL {p.divergence:.3f}  facts {p.found:.2f}  "
        f"asked later {p.found_later:.2f}  {p.settings}"
    )


def cache_table(result: CacheSweep) -> str:
    """A row a point, those that keep least last within a policy."""
    head = [
        "policy",
        "settings",
        "kept",
        "with notes",
        "bits a byte",
        "same token",
        "KL, bits",
        "first other",
        "facts",
        "facts asked later",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for p in in_order(result.points):
        cells = [
            f"`{p.name}`",
            p.settings.replace(",", ", "),
            f"{p.kept:.3f}",
            f"{p.held:.3f}",
            f"{p.bits_per_byte:.3f}",
            f"{p.agreement:.3f}",
        ]
        cells += [f"{p.divergence:.3f}", f"{p.same:.0f}", f"{p.found:.2f}", f"{p.found_later:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def depth_table(result: CacheSweep) -> str:
    """Facts found by depth, the question in the prompt / after it."""
    depths = [f"{d:g}" for d in result.config.depths]
    head = ["policy", "settings", "kept", *[f"at {d}" for d in depths]]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for p in in_order(result.points):
        cells = [
            f"`{p.name}`",
            p.settings.replace(",", ", "),
            f"{p.kept:.3f}",
            *[f"{p.retrieval[d]:.2f} / {p.later[d]:.2f}" for d in depths],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def in_order(points: list[CachePoint]) -> list[CachePoint]:
    names = list(dict.fromkeys(p.name for p in points))
    return sorted(points, key=lambda p: (names.index(p.name), -p.kept))


def cache_plots(result: CacheSweep) -> dict[str, str]:
    """SVG text by file name: what is lost or found, against kept bytes; every line ends at the full cache."""
    measures: dict[str, tuple[str, Callable[[CachePoint], float]]] = {
        "bits": ("bits per byte", lambda p: p.bits_per_byte),
        "needles": ("share of facts found", lambda p: p.found),
        "later": ("share of facts found, asked later", lambda p: p.found_later),
        "generation": ("KL from the full cache, bits", lambda p: p.divergence),
    }
    made: dict[str, str] = {}
    whole = next(p for p in result.points if p.name == "full")
    for key, (label, value) in measures.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for p in in_order(result.points):
            if p.name != "full":
                lines.setdefault(p.name, [(whole.kept, value(whole))]).append((p.kept, value(p)))
        made[f"{key}.svg"] = figure(
            f"{label}, {result.config.length} tokens", "kept bytes / all bytes", label, lines or {"full": [(1.0, value(whole))]}
        )
    return made


def write_cache(result: CacheSweep, out: Path) -> None:
    """report.json, table.md and the plots, in `out`."""
    write_points(result, out)
    write_text(out / "table.md", f"{cache_table(result)}\n\n{depth_table(result)}\n")
    for name, svg in cache_plots(result).items():
        write_text(out / name, svg)
