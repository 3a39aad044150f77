"""Plots as SVG text: what reports hold and experiments return. Colours follow the page's light or dark theme; points tell their values."""

from __future__ import annotations

import functools
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import MissingDependency, RegardError

# Okabe and Ito's colours, which colour-blind people tell apart; markers differ as well, for print.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6bb1", "#7f7f7f")
MARKS = ("circle", "square", "diamond", "triangle")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 360, 62, 14, 34, 46
ROW = 18  # of the legend
SANS = ("Helvetica Neue", "Segoe UI", "Helvetica", "Arial", "DejaVu Sans", "Liberation Sans", "Noto Sans", "Ubuntu", "Cantarell")
Point = tuple[float, ...]  # (x, y), or (x, y, low, high) with an interval of y


class Plot(str):
    """A plot: SVG text, which notebooks show as a picture."""

    def _repr_svg_(self) -> str:
        return str(self)

    def save(self, file: str | Path, scale: float = 2.0) -> Path:
        """Written as SVG, or, by the end of the file's name, as PNG on white (with resvg; `scale` pixels a unit of the SVG's)."""
        file = Path(file)
        if file.suffix not in (".svg", ".png"):
            raise RegardError(f"file={str(file)!r}; expected a name that ends in .svg or .png")
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".svg":
            file.write_text(self)
            return file
        if not scale > 0:
            raise RegardError(f"scale={scale}; expected more than 0")
        file.write_bytes(rendered(str(self), sans_serif_family=sans(), zoom=scale, background="white"))
        return file


def rendered(svg: str, **options: Any) -> bytes:
    """PNG, by resvg."""
    try:
        import resvg_py
    except ImportError as missing:
        raise MissingDependency("plots as PNG need resvg-py: pip install 'regard[report]'") from missing
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, **options))


@functools.cache
def sans() -> str:
    """A sans-serif font of this machine: resvg leaves text out where it does not find the one it is told."""
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 20" font-family="sans-serif">{}</svg>'
    blank = rendered(svg.format(""))
    found = next((name for name in SANS if rendered(svg.format('<text y="15">A</text>'), sans_serif_family=name) != blank), None)
    if found is None:
        raise MissingDependency(f"plots as PNG need a font; expected one of {', '.join(SANS)} to be installed, or a file that ends in .svg")
    return found


class Axis:
    """Numbers along a stretch of pixels."""

    def __init__(self, values: Sequence[float], first: float, last: float, log: bool, pad: float):
        self.log = log and min(values) > 0
        low, high = (f(map(self.scaled, values)) for f in (min, max))
        room = (high - low or abs(high) * 0.1 or 1.0) * pad
        self.low, self.high, self.first, self.last = low - room, high + room, first, last

    def scaled(self, x: float) -> float:
        return math.log(x) if self.log else x

    def at(self, x: float) -> float:
        return self.first + (self.scaled(x) - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        if self.log:
            low, high = math.exp(self.low), math.exp(self.high)
            base = 10 if high / low > 300 else 2
            first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
            return [float(base) ** n for n in range(first, last + 1, max(1, math.ceil((last - first + 1) / 9)))]
        step = 10 ** math.floor(math.log10(self.high - self.low))
        step *= next(f for f in (0.1, 0.2, 0.5, 1, 2, 5, 10) if (self.high - self.low) / (f * step) <= 7)
        return [n * step for n in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def number(x: float) -> str:
    """A number as people write it: 16k, 0.25, 3.1."""
    for size, letter in ((2**30, "Gi"), (2**20, "Mi"), (1024, "k")):
        if size <= x < 1024 * size and x % (size / 8) == 0:
            return f"{x / size:g}{letter}"
    if abs(x) >= 1e5:
        return f"{x:.1e}".replace("e+0", "e").replace("e+", "e")
    return f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}"


def marker(kind: str, x: float, y: float, colour: str, title: str) -> str:
    shape = {
        "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6"',
        "square": f'<rect x="{x - 3.2:.1f}" y="{y - 3.2:.1f}" width="6.4" height="6.4"',
        "diamond": f'<path d="M{x:.1f} {y - 4.6:.1f}l4.6 4.6l-4.6 4.6l-4.6 -4.6z"',
        "triangle": f'<path d="M{x:.1f} {y - 4.4:.1f}l4.4 7.8h-8.8z"',
    }[kind]
    name = shape[1:].split()[0]
    return f'{shape} fill="{colour}"><title>{html.escape(title)}</title></{name}>'


def figure(title: str, x: str, y: str, lines: Mapping[str, Sequence[Point]], log_x: bool = False, log_y: bool = False) -> Plot:
    """An SVG plot of named lines of points (x, y) or (x, y, low, high); points that are no numbers are left out."""
    kept = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in lines.items()}
    columns = 2 if max(map(len, kept), default=0) <= 34 else 1
    out, across, up = frame(title, x, y, [p for found in kept.values() for p in found], log_x, log_y, -(-len(kept) // columns))
    if across is None or up is None:
        return Plot(out[0])
    for at, (name, found) in enumerate(kept.items()):
        out += line(at, name, sorted(found), across, up, x, y)
        out.append(legend(at, name, columns))
    return Plot("".join(out) + "</svg>")


def scatter(title: str, x: str, y: str, groups: Mapping[str, Mapping[str, tuple[float, float]]], log_x: bool = False) -> Plot:
    """An SVG plot of named points in named groups; the first group is pale, for the rest to stand out from, and has its names on hover only."""
    kept = {group: {name: p for name, p in points.items() if all(map(math.isfinite, p))} for group, points in groups.items()}
    out, across, up = frame(title, x, y, [p for found in kept.values() for p in found.values()], log_x, False, len(kept))
    if across is None or up is None:
        return Plot(out[0])
    for at, (group, found) in enumerate(kept.items()):
        for name, (a, b) in found.items():
            told = f"{name}: {number(a)} {x}, {b:.4g} {y} ({group})"
            dot = marker(MARKS[at % 4], across.at(a), up.at(b), COLOURS[-1] if at == 0 else COLOURS[at - 1], told)
            out.append(f'<g opacity=".55">{dot}</g>' if at == 0 else dot)
            if at:
                right = across.at(a) < WIDTH - 130
                place = f'x="{across.at(a) + (7 if right else -7):.1f}" y="{up.at(b) + 4:.1f}" text-anchor="{"start" if right else "end"}"'
                out.append(f'<text {place} font-size="11">{html.escape(name)}</text>')
        out.append(legend(at, group, 1, COLOURS[-1] if at == 0 else COLOURS[at - 1]))
    return Plot("".join(out) + "</svg>")


def legend(at: int, name: str, columns: int, colour: str | None = None) -> str:
    """The entry of the line or group number `at`, below the plot."""
    left, top = LEFT + at % columns * (WIDTH - LEFT) / columns, HEIGHT + ROW * (at // columns) + 12
    mark = marker(MARKS[at % 4], left, top - 4, colour or COLOURS[at % 8], name)
    return mark + f'<text x="{left + 10}" y="{top}">{html.escape(name)}</text>'


def frame(
    title: str, x: str, y: str, points: Sequence[Point], log_x: bool, log_y: bool, rows: int
) -> tuple[list[str], Axis | None, Axis | None]:
    """The open SVG with its axes, and both axes; a closed one, and none, where there is nothing to show. rows: of the legend."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + ROW * rows + 8}" role="img" aria-label="{html.escape(title)}" '
        'font-family="system-ui,sans-serif" font-size="12" fill="currentColor">'
        f'<text x="{LEFT}" y="20" font-size="15" font-weight="600">{html.escape(title)}</text>'
    )
    if not points:
        return [head + f'<text x="{LEFT}" y="60">nothing to show</text></svg>'], None, None
    across = Axis([p[0] for p in points], LEFT, WIDTH - RIGHT, log_x, 0.03)
    spread = [y for p in points for y in (p[1:] if not log_y else p[1:2])]
    up = Axis(spread, HEIGHT - BOTTOM, TOP, log_y, 0.05)
    out = [head]
    for tick in up.ticks():
        at = up.at(tick)
        out.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="currentColor" opacity=".15"/>')
        out.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    marks = sorted({p[0] for p in points}) if log_x and len({p[0] for p in points}) <= 8 else across.ticks()
    out += [f'<text x="{across.at(t):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{number(t)}</text>' for t in marks]
    out.append(f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" stroke="currentColor" fill="none" opacity=".6"/>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{html.escape(x)}</text>')
    out.append(f'<text transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">{html.escape(y)}</text>')
    return out, across, up


def line(at: int, name: str, points: Sequence[Point], across: Axis, up: Axis, x: str, y: str) -> list[str]:
    colour, dash = COLOURS[at % 8], "" if at < 8 else ' stroke-dasharray="6 3"'
    places = [(across.at(p[0]), up.at(p[1])) for p in points]
    out = [f'<path d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in places)}" stroke="{colour}" stroke-width="1.8" fill="none"{dash}/>']
    for p, (a, b) in zip(points, places, strict=True):
        wide = len(p) > 2 and p[2] < p[3]
        if wide and not up.log:
            out.append(f'<path d="M{a:.1f} {up.at(p[2]):.1f}V{up.at(p[3]):.1f}" stroke="{colour}" opacity=".55"/>')
        told = f"{name}: {p[1]:.4g}" + (f" ({p[2]:.3g} to {p[3]:.3g})" if wide else "") + f" {y} at {number(p[0])} {x}"
        if len(points) <= 24:
            out.append(marker(MARKS[at % 4], a, b, colour, told))
        else:  # a curve: places to hover over, not to see
            out.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="5" fill="{colour}" opacity="0"><title>{html.escape(told)}</title></circle>')
    return out


def bars(title: str, values: Mapping[str, float]) -> Plot:
    """An SVG of named numbers, a bar each; those that are no numbers have none."""
    finite = [v for v in values.values() if math.isfinite(v)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    left, right, tall = 200, WIDTH - 80, 24
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {TOP + tall * len(values) + 8}" role="img" aria-label="{html.escape(title)}" '
        'font-family="system-ui,sans-serif" font-size="12" fill="currentColor">'
        f'<text x="{left}" y="20" font-size="15" font-weight="600">{html.escape(title)}</text>'
    ]
    place = lambda v: left + (right - left) * (v - low) / (high - low or 1.0)  # noqa: E731
    for at, (name, value) in enumerate(values.items()):
        top = TOP + tall * at
        out.append(f'<text x="{left - 8}" y="{top + 15}" text-anchor="end">{html.escape(name)}</text>')
        if math.isfinite(value):
            x, end = sorted((place(0.0), place(value)))
            out.append(f'<rect x="{x:.1f}" y="{top + 3}" width="{end - x:.1f}" height="{tall - 7}" fill="{COLOURS[0]}"/>')
        out.append(f'<text x="{right + 6}" y="{top + 15}">{value:.4g}</text>')
    return Plot("".join(out) + "</svg>")


# Viridis at even steps, in its own order from low to high.
SCALE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
MOST = 96  # rows and columns of cells; larger tables show means


def shade(share: float) -> str:
    """The colour of a share between 0 and 1."""
    at = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    low = min(int(at), len(SCALE) - 2)
    return "#" + "".join(f"{round(a + (b - a) * (at - low)):02x}" for a, b in zip(SCALE[low], SCALE[low + 1], strict=True))


def thinned(values: Sequence[Sequence[float]]) -> tuple[list[list[float]], int, int]:
    """A table of at most MOST rows and columns, each cell the mean of the numbers it stands for; and how many rows and columns a cell spans."""
    down, across = -(-len(values) // MOST), -(-max(map(len, values), default=1) // MOST)
    rows = []
    for top in range(0, len(values), down):
        row = []
        for left in range(0, len(values[top]), across):
            cell = [x for line in values[top : top + down] for x in line[left : left + across] if math.isfinite(x)]
            row.append(sum(cell) / len(cell) if cell else math.nan)
        rows.append(row)
    return rows, down, across


def heatmap(title: str, x: str, y: str, values: Sequence[Sequence[float]]) -> Plot:
    """An SVG of a table of numbers, its first row on top; NaN stays empty."""
    rows, down, across = thinned(values)
    numbers = [v for row in rows for v in row if math.isfinite(v)]
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
    width = (WIDTH - LEFT - 70) / max(map(len, rows), default=1)
    tall = min(28.0, max(width, 260 / max(1, len(rows))), 420 / max(1, len(rows)))
    bottom = TOP + tall * len(rows)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 44:.0f}" role="img" aria-label="{html.escape(title)}" '
        'font-family="system-ui,sans-serif" font-size="12" fill="currentColor" shape-rendering="crispEdges">'
        f'<text x="{LEFT}" y="20" font-size="15" font-weight="600">{html.escape(title)}</text>'
    ]
    for r, row in enumerate(rows):
        for c, value in enumerate(row):
            if math.isfinite(value):
                told = f"{y} {r * down}, {x} {c * across}: {value:.4g}"
                fill = shade((value - low) / (high - low) if high > low else 0.5)
                out.append(
                    f'<rect x="{LEFT + c * width:.2f}" y="{TOP + r * tall:.2f}" width="{width:.2f}" height="{tall:.2f}" fill="{fill}">'
                    f"<title>{html.escape(told)}</title></rect>"
                )
    for r in range(0, len(rows), max(1, len(rows) // 8)):
        out.append(f'<text x="{LEFT - 6}" y="{TOP + (r + 0.5) * tall + 4:.1f}" text-anchor="end">{r * down}</text>')
    for c in range(0, max(map(len, rows), default=0), max(1, max(map(len, rows), default=0) // 10)):
        out.append(f'<text x="{LEFT + (c + 0.5) * width:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{c * across}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - 70) / 2:.0f}" y="{bottom + 34:.0f}" text-anchor="middle">{html.escape(x)}</text>')
    out.append(f'<text transform="translate(14 {(TOP + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">{html.escape(y)}</text>')
    for step in range(24):
        at = bottom - (step + 1) * (bottom - TOP) / 24
        out.append(f'<rect x="{WIDTH - 58}" y="{at:.2f}" width="12" height="{(bottom - TOP) / 24 + 0.5:.2f}" fill="{shade(step / 23)}"/>')
    size = max(abs(low), abs(high))  # an end that is next to nothing is shown as 0
    out += [
        f'<text x="{WIDTH - 42}" y="{at:.0f}">{v if abs(v) > 1e-3 * size else 0:.3g}</text>' for at, v in ((TOP + 10, high), (bottom, low))
    ]
    return Plot("".join(out) + "</svg>")
