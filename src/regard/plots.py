"""Plots as SVG text: what reports hold and experiments return."""

from __future__ import annotations

import io
from typing import Any

from .errors import MissingDependency


def figure(title: str, x: str, y: str, lines: dict[str, list[tuple[float, float]]], log_x: bool = False, log_y: bool = False) -> str:
    """An SVG plot of named lines of (x, y) points. MissingDependency without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise MissingDependency("the report's plots need matplotlib: pip install 'regard[report]'") from None
    fig, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for number, (name, points) in enumerate(lines.items()):
        style: dict[str, Any] = {"marker": "osv^Dx*P"[number % 8], "markersize": 4} if len(points) < 20 else {}
        axes.plot([p for p, _ in points], [p for _, p in points], label=name, color=f"C{number % 10}", **style)
    axes.set(title=title, xlabel=x, ylabel=y)
    if log_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({p for points in lines.values() for p, _ in points})
        axes.set_xticks(ticks, [f"{int(t)}" for t in ticks])
    if log_y:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    text = io.StringIO()
    fig.savefig(text, format="svg", metadata={"Date": None})
    plt.close(fig)
    return text.getvalue()[text.getvalue().index("<svg") :]


def heatmap(title: str, x: str, y: str, values: list[list[float]]) -> str:
    """An SVG of a table of numbers, its first row on top; NaN stays white. MissingDependency without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise MissingDependency("plots need matplotlib: pip install 'regard[report]'") from None
    fig, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    fig.colorbar(axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest"), ax=axes)
    axes.set(title=title, xlabel=x, ylabel=y)
    text = io.StringIO()
    fig.savefig(text, format="svg", metadata={"Date": None})
    plt.close(fig)
    return text.getvalue()[text.getvalue().index("<svg") :]
