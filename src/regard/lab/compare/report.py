"""The report: one HTML file that needs no network, with its plots inside."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from ...plots import figure
from ..files import write_text

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
h1{margin-bottom:0}p.sub{color:#666;margin-top:.2rem}p.verdict{background:#f4f6f8;border-left:4px solid #3b6ea5;padding:.8rem 1rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(480px,1fr));gap:1rem}figure{margin:0}figure svg{width:100%;height:auto}
figcaption{color:#555;font-size:.9rem}table{border-collapse:collapse;width:100%;margin:1rem 0}
th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}
"""


def curves(report: dict[str, Any], stage: str, pick: Any) -> dict[str, list[tuple[float, float]]]:
    return {name: pick(one[stage]) for name, one in report["mechanisms"].items() if stage in one}


def by_length(key: str, part: str = "ratio") -> Any:
    return lambda speed: [(int(length), value) for length, value in speed[part][key].items()]


PLOTS: list[tuple[str, str, str, str, str, Any, bool, bool, str]] = [
    (
        "loss",
        "Learning text",
        "step",
        "bits per byte",
        "language",
        lambda one: one["train_bits"],
        False,
        False,
        "Training loss; every mechanism sees the same bytes.",
    ),
    (
        "extrapolation",
        "Beyond the training length",
        "times the training length",
        "bits per byte",
        "language",
        lambda one: [(int(t), v) for t, v in one["valid_bits"].items()],
        True,
        False,
        "Held-out loss on windows of 1, 2 and 4 times the training length.",
    ),
    (
        "recall",
        "Associative recall",
        "key-value pairs",
        "accuracy",
        "synthetic",
        lambda one: [(int(n), v) for n, v in one["recall"].items()],
        True,
        False,
        "Multi-query associative recall: share of queried keys whose value is given.",
    ),
    (
        "prefill",
        "Time to read a prompt",
        "tokens",
        "ratio to softmax",
        "speed",
        by_length("prefill"),
        True,
        True,
        "Median of runs taken in turns; below 1 is faster than softmax.",
    ),
    (
        "memory",
        "Memory while reading",
        "tokens",
        "bytes",
        "speed",
        lambda one: [(int(length), value) for length, value in one["memory"].items()],
        True,
        True,
        "Most bytes of tensors alive at once (workspace inside a kernel is not seen).",
    ),
    (
        "decode",
        "Time of one decoding step",
        "tokens before it",
        "ratio to softmax",
        "speed",
        by_length("decode"),
        True,
        True,
        "Median step after a prompt of that length.",
    ),
    (
        "state",
        "Kept between tokens",
        "tokens",
        "bytes",
        "speed",
        lambda one: [(int(length), value) for length, value in one["state"].items()],
        True,
        True,
        "Cache or state of one layer.",
    ),
]


def table(report: dict[str, Any]) -> str:
    heads = [
        "mechanism",
        "bits/byte",
        "at 2x",
        "at 4x",
        "recall",
        "copying",
        "sink mass",
        "prefill vs softmax",
        "state vs softmax",
        "parameters",
    ]
    rows = []
    for name, one in report["mechanisms"].items():
        language, synthetic, speed = one.get("language"), one.get("synthetic"), one.get("speed")
        cells = [name]
        cells += [f"{language['valid_bits'][t]:.3f}" for t in "124"] if language else ["-"] * 3
        cells += (
            [f"{sum(synthetic['recall'].values()) / len(synthetic['recall']):.0%}", f"{synthetic['copying']:.0%}"]
            if synthetic
            else ["-"] * 2
        )
        cells.append(f"{language['sink_mass']:.1%}" if language and language["sink_mass"] is not None else "-")
        longest = max(speed["ratio"]["prefill"], key=int) if speed else ""
        cells += (
            [f"{speed['ratio']['prefill'][longest]:.2f} at {longest}", f"{speed['ratio']['state'][longest]:.3f}"] if speed else ["-"] * 2
        )
        cells.append(f"{language['parameters']:,}" if language else "-")
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return (
        "<table><thead><tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr></thead><tbody>" + "".join(rows) + "</tbody></table>"
    )


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the HTML report; plots whose numbers were not measured are left out."""
    figures = []
    for key, title, x, y, stage, pick, log_x, log_y, caption in PLOTS:
        lines = curves(report, stage, pick)
        if lines:
            figures.append(
                f'<figure id="{key}">{figure(title, x, y, lines, log_x, log_y)}<figcaption>{html.escape(caption)}</figcaption></figure>'
            )
    config, env = report["config"], report["environment"]
    told = (
        f"{report['text']}; {config['layers']} layers of {config['dim']} channels, {config['heads']} heads, {config['seq_len']} tokens, seed {config['seed']}; "
        f"PyTorch {env['torch']}, {env['threads']} threads" + ("" if report["finished"] else "; stopped before the end")
    )
    body = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>regard: {html.escape(", ".join(report["mechanisms"]))}</title>
<style>{STYLE}</style></head><body><h1>Which attention?</h1><p class="sub">{html.escape(told)}</p>
<p class="verdict">{html.escape(report["verdict"])}</p>{table(report)}<div class="plots">{"".join(figures)}</div></body></html>"""
    write_text(path, body)
