"""The report: one HTML file that needs no network, one figure a question, every number to hover over, every column to sort by."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...plots import Point, figure, scatter
from ..files import write_text
from .statistics import Estimate, curve, estimate, measure, seeds_of
from .study import MEASURES, read

STYLE = """
:root{color-scheme:light dark;--page:#fff;--text:#1b1b1b;--quiet:#5c5c5c;--line:#ddd;--box:#f3f6f9;--mark:#0072b2}
@media(prefers-color-scheme:dark){:root{--page:#14171a;--text:#e8e8e8;--quiet:#a8a8a8;--line:#3a3f44;--box:#1f252a;--mark:#56b4e9}}
body{font:16px/1.5 system-ui,sans-serif;max-width:1180px;margin:1.5rem auto;padding:0 1rem;color:var(--text);background:var(--page)}
h1{margin-bottom:0}p.sub{color:var(--quiet);margin-top:.2rem}p.verdict{background:var(--box);border-left:4px solid var(--mark);padding:.8rem 1rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:1.2rem}figure{margin:0;break-inside:avoid}
figure svg{width:100%;height:auto}figcaption{color:var(--quiet);font-size:.9rem}.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;margin:1rem 0;font-variant-numeric:tabular-nums}th,td{padding:.35rem .6rem;text-align:right;
border-bottom:1px solid var(--line);white-space:nowrap}th:first-child,.words{text-align:left}td.words:not(:first-child){white-space:normal}td.words:last-child{min-width:18rem}th{cursor:pointer}th:hover{color:var(--mark)}
th[aria-sort=ascending]::after{content:" \\25B2"}th[aria-sort=descending]::after{content:" \\25BC"}
@media print{@page{margin:14mm}:root{color-scheme:light;--page:#fff;--text:#000;--quiet:#444;--line:#bbb;--box:#f3f6f9;--mark:#0072b2}
body{font-size:10pt;max-width:none;margin:0;padding:0}.wide{overflow:visible}table{font-size:6.5pt}th,td{padding:.15rem .25rem;white-space:normal}
td.words:last-child{min-width:9rem}.plots{display:block}figure{display:inline-block;width:48%;vertical-align:top;margin:0 1% .6rem 0}}
"""
SORT = """
document.querySelectorAll("th").forEach((head,at)=>head.addEventListener("click",()=>{const body=head.closest("table").tBodies[0],
up=head.getAttribute("aria-sort")!=="ascending",key=row=>{const text=row.cells[at].dataset.sort;return text===""?Infinity:isNaN(text)?text:+text};
document.querySelectorAll("th").forEach(other=>other.removeAttribute("aria-sort"));head.setAttribute("aria-sort",up?"ascending":"descending");
[...body.rows].sort((a,b)=>{const x=key(a),y=key(b);return (x<y?-1:x>y?1:0)*(up?1:-1)}).forEach(row=>body.append(row))}));
"""
Curves = Callable[[dict[str, Any]], list[Point]]


def with_interval(found: list[tuple[float, Estimate]], top: float = math.inf) -> list[Point]:
    """Points and their intervals, which end where the measure does: at 0 and at `top`."""
    return [(n, e.mean, max(0.0, e.low), min(top, e.high)) for n, e in found]


def learning(task: str) -> Curves:
    """The loss of training, mean over seeds."""

    def pick(one: dict[str, Any]) -> list[Point]:
        runs = [dict(map(tuple, run["loss"])) for run in seeds_of(one, task)]
        steps = [step for step in runs[0] if all(step in run for run in runs)] if runs else []
        found = [(float(step), estimate([run[step] for run in runs])) for step in steps]
        return [(step, value.mean) for step, value in found if value is not None]

    return pick


def by_length(*path: str) -> Curves:
    def pick(one: dict[str, Any]) -> list[Point]:
        found: Any = one.get("speed")
        for key in path:
            found = found and found[key]
        return [(int(length), value) for length, value in (found or {}).items()]

    return pick


def at_numbers(task: str, key: str) -> Curves:
    return lambda one: with_interval(curve(one, task, key), 1.0 if key == "accuracy" else math.inf)


# id, title, x, y, curves, log x, log y, caption
PLOTS: list[tuple[str, str, str, str, Curves, bool, bool, str]] = [
    (
        "loss",
        "How fast does it learn text?",
        "steps",
        "bits per byte",
        learning("language"),
        False,
        False,
        "Training loss, mean over seeds; every mechanism sees the same bytes.",
    ),
    (
        "extrapolation",
        "Does it hold beyond its length?",
        "times the training length",
        "bits per byte",
        at_numbers("language", "bits"),
        True,
        False,
        "Held-out loss on windows of 1, 2 and 4 times the training length.",
    ),
    (
        "recall",
        "How much does it remember?",
        "key-value pairs",
        "accuracy",
        at_numbers("recall", "accuracy"),
        True,
        False,
        "Multi-query associative recall: the share of asked keys whose value is given. Bars: 95% interval over seeds.",
    ),
    (
        "prefill",
        "How long does a prompt take?",
        "tokens",
        "ratio to softmax",
        by_length("ratio", "prefill"),
        True,
        True,
        "Median of runs taken in turns; below 1 is faster than softmax.",
    ),
    (
        "decode",
        "How long does a token take?",
        "tokens before it",
        "ratio to softmax",
        by_length("ratio", "decode"),
        True,
        True,
        "Median decoding step after a prompt of that length.",
    ),
    (
        "memory",
        "How much memory does a prompt take?",
        "tokens",
        "bytes",
        by_length("memory"),
        True,
        True,
        "Most bytes of tensors alive at once (workspace inside a kernel is not seen).",
    ),
    (
        "state",
        "What is kept between tokens?",
        "tokens",
        "bytes",
        by_length("state"),
        True,
        True,
        "Cache or state of one layer.",
    ),
]


def cells(name: str, one: dict[str, Any]) -> list[tuple[str, float | str]]:
    """(text, what to sort by) of a mechanism's row."""
    speed = one.get("speed")

    def told(found: Estimate | None, form: str) -> tuple[str, float | str]:
        return ("-", "") if found is None else (found.text(form), found.mean)

    recall = curve(one, "recall", "accuracy")
    copying = curve(one, "copying", "accuracy")
    row = [(name, name), *(told(measure(one, "language", "bits", n), ".3f") for n in "124")]
    row += [told(recall[0][1] if recall else None, ".0%"), told(recall[-1][1] if recall else None, ".0%")]
    row += [told(copying[-1][1] if copying else None, ".0%"), told(measure(one, "language", "sink_mass"), ".1%")]
    if speed:
        last = max(speed["ratio"]["prefill"], key=int)
        row += [(f"{speed['ratio'][key][last]:.3g}x", speed["ratio"][key][last]) for key in ("prefill", "decode", "state")]
    else:
        row += [("-", "")] * 3
    size = measure(one, "language", "parameters")
    return [*row, ("-", "") if size is None else (f"{size.mean:,.0f}", size.mean)]


def table(report: dict[str, Any]) -> str:
    results = report["mechanisms"]
    pairs = sorted({n for one in results.values() for n, _ in curve(one, "recall", "accuracy")})
    few, many = (f"{pairs[0]:g} pairs", f"{pairs[-1]:g} pairs") if pairs else ("few pairs", "many pairs")
    lengths = [n for one in results.values() if "speed" in one for n in one["speed"]["ratio"]["prefill"]]
    longest = f" at {max(lengths, key=int)}" if lengths else ""
    heads = ["mechanism", "bits/byte", "at 2x", "at 4x", f"recall of {few}", many, "copying", "sink mass"]
    heads += [f"prompt{longest}", "token", "state", "parameters"]
    return sortable(heads, [cells(name, one) for name, one in results.items()])


def sortable(heads: list[str], rows: list[list[tuple[str, float | str]]]) -> str:
    """A table of (text, what to sort by); what is sorted by its own letters is words, and may take several lines."""
    words = ' class="words"'
    lines = [
        "<tr>"
        + "".join(f'<td{words * bool(key == text)} data-sort="{html.escape(str(key))}">{html.escape(text)}</td>' for text, key in row)
        + "</tr>"
        for row in rows
    ]
    worded = [text == key for text, key in rows[0]] if rows else [False] * len(heads)
    head = "".join(f'<th{words * of_words} scope="col">{html.escape(text)}</th>' for text, of_words in zip(heads, worded, strict=True))
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def page(title: str, names: list[str], told: str, verdict: str, table: str, note: str, figures: list[str]) -> str:
    """The whole file; table and figures are HTML, the rest plain text."""
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>regard: {html.escape(", ".join(names))}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>
<p class="sub">{html.escape(told)}</p><p class="verdict">{html.escape(verdict)}</p>{table}
<p class="sub">{html.escape(note)}</p>
<div class="plots">{"".join(figures)}</div><script>{SORT}</script></body></html>"""


def standing(report: dict[str, Any]) -> list[str]:
    """This run over the shipped study: bits per byte against recall; nothing where either is missing."""
    study = read()
    recall, bits = study.quality("recall"), study.quality("text")
    shipped = {spec: (recall[spec].mean, bits[spec].mean) for spec in recall if spec in bits}
    local = {}
    for name, one in report["mechanisms"].items():
        x, y = (measure(one, *MEASURES[task][0]) if seeds_of(one, MEASURES[task][0][0]) else None for task in ("recall", "text"))
        if x is not None and y is not None:
            local[name] = (x.mean, y.mean)
    if not local:
        return []
    groups = {"the shipped study": shipped, "this run": local}
    plot = scatter("Where does it stand among the others?", MEASURES["recall"][2], MEASURES["text"][2], groups)
    note = f"The study ({study.told}) was made elsewhere: it shows who there is, not what this run should have reached. Hover for names."
    return [f'<figure id="standing">{plot}<figcaption>{html.escape(note)}</figcaption></figure>']


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the HTML report; plots whose numbers were not measured are left out."""
    figures = []
    for key, title, x, y, pick, log_x, log_y, caption in PLOTS:
        lines = {name: found for name, one in report["mechanisms"].items() if (found := pick(one))}
        if any(math.isfinite(p[1]) for found in lines.values() for p in found):
            plot = figure(title, x, y, lines, log_x, log_y)
            figures.append(f'<figure id="{key}">{plot}<figcaption>{html.escape(caption)}</figcaption></figure>')
    figures += standing(report)
    config, env = report["config"], report["environment"]
    told = (
        f"{report['text']}; {config['layers']} layers of {config['dim']} channels, {config['heads']} heads, {config['seq_len']} tokens, "
        f"{report['rounds'] or 0} seeds from {config['seed']}; PyTorch {env['torch']}, {env['threads']} threads"
        + ("" if report["finished"] else "; stopped before the end")
    )
    note = "Prompt, token and state are ratios to softmax; click a column to sort by it."
    write_text(path, page("Which attention?", list(report["mechanisms"]), told, report["verdict"], table(report), note, figures))
