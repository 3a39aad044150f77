"""Writes docs/report.svg, the README's picture, from the report of a demo: python docs/picture.py runs/demo/report.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from regard.lab.compare.report import PLOTS
from regard.plots import figure

SHOWN = ("loss", "recall", "prefill", "state")
WIDTH, HEIGHT, GAP = 560, 426, 20


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    parts = []
    for at, (_, title, x, y, pick, log_x, log_y, _) in enumerate(plot for plot in PLOTS if plot[0] in SHOWN):
        lines = {name: found for name, one in report["mechanisms"].items() if (found := pick(one))}
        place = f'<svg x="{at % 2 * (WIDTH + GAP)}" y="{at // 2 * (HEIGHT + GAP)}" width="{WIDTH}" height="{HEIGHT}"'
        parts.append(figure(title, x, y, lines, log_x, log_y).replace("<svg", place, 1))
    size = 2 * WIDTH + GAP, 2 * HEIGHT + GAP
    page = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" color="#1b1b1b"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    Path(__file__).with_name("report.svg").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
