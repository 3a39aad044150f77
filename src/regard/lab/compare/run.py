"""The order of a comparison: stages of work, each saved when done, so that stopping loses nothing and --resume goes on."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ...errors import RegardError
from ...tasks import Corpus, python_text, read_text
from ..files import write_text
from .config import Config
from .report import write_report
from .speed import measure
from .train import seconds_per_step, train_language, train_synthetic
from .verdict import verdict

SHARES = {"language": 0.52, "synthetic": 0.26}  # of the budget; timing and evaluation take the rest


def load_corpus(config: Config) -> Corpus:
    return python_text() if config.text is None else read_text(config.text, config.needed_bytes)


def fingerprint(config: Config, corpus: Corpus) -> str:
    """What must be equal for finished results to be taken over."""
    told = {key: value for key, value in config.as_dict().items() if key not in ("out", "mechanisms", "text")}
    digest = hashlib.sha256(bytes(corpus.train[:1_000_000].tolist())).hexdigest()
    return hashlib.sha256((json.dumps(told, sort_keys=True) + digest).encode()).hexdigest()[:16]


def environment() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def resumed(path: Path, mark: str) -> dict[str, Any]:
    """Finished results of an earlier run with the same settings."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    mechanisms = found.get("mechanisms") if isinstance(found, dict) else None
    if not isinstance(found, dict) or "fingerprint" not in found or not isinstance(mechanisms or {}, dict):
        raise RegardError(f"--resume: {path} is not a report that can be read; remove it or leave out --resume")
    if found.get("fingerprint") != mark:
        raise RegardError(f"--resume: {path} was made with other settings or text; use the same ones, or leave out --resume")
    return dict(found)


def compare(config: Config, resume: bool = False, console: Console | None = None) -> tuple[dict[str, Any], bool]:
    """Run a comparison and write report.json and report.html in config.out; returns (report, whether it was finished)."""
    console = console or Console(stderr=True)
    corpus = load_corpus(config)
    path, mark = config.out / "report.json", fingerprint(config, corpus)
    old = resumed(path, mark) if resume else {}
    config.prepare_out()
    names = list(config.mechanisms)
    report: dict[str, Any] = {
        "fingerprint": mark,
        "config": config.as_dict(),
        "text": corpus.name,
        "environment": environment(),
        "steps": old.get("steps"),
        "mechanisms": {name: old.get("mechanisms", {}).get(name, {}) for name in names},
    }

    def save() -> None:
        write_text(path, json.dumps(report, indent=1))

    finished = False
    bar = Progress(
        TextColumn("{task.description:42}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn(), console=console
    )
    try:
        with bar:
            work(config, corpus, report, bar, save)
        finished = True
    except KeyboardInterrupt:
        console.print("stopped; finished results are kept. Go on with --resume")
    report["verdict"] = verdict(report)
    report["finished"] = finished
    save()
    write_report(report, config.out / "report.html")
    return report, finished


def work(config: Config, corpus: Corpus, report: dict[str, Any], bar: Progress, save: Callable[[], None]) -> None:
    results = report["mechanisms"]
    if report["steps"] is None:
        report["steps"] = decide_steps(config, corpus, bar)
    steps = report["steps"]
    stages: list[tuple[str, str, Callable[[str, Callable[[float], None]], dict[str, Any]], float]] = [
        (
            "language",
            "learning text",
            lambda name, tick: train_language(config, name, corpus, steps["language"], tick),
            steps["language"] + 1.5,
        ),
        ("synthetic", "recall and copying", lambda name, tick: train_synthetic(config, name, steps["synthetic"], tick), steps["synthetic"]),
    ]
    missing = [name for name, one in results.items() if "speed" not in one]
    if missing:  # timed together: ratios hold within one run
        line = bar.add_task("time and memory against length", total=len(config.lengths) * (len(results) + ("softmax" not in results)))
        for name, one in measure(config, lambda n: bar.advance(line, n)).items():
            if name in results:
                results[name]["speed"] = one
        bar.update(line, completed=bar.tasks[line].total)
        save()
    for key, what, run, total in stages:
        for name in results:
            if key in results[name]:
                continue
            line = bar.add_task(f"{what}: {name}", total=total)
            start = time.perf_counter()
            results[name][key] = run(name, lambda n, line=line: bar.advance(line, n))  # type: ignore[misc]
            results[name][key]["seconds"] = time.perf_counter() - start
            bar.update(line, completed=total)
            save()


def decide_steps(config: Config, corpus: Corpus, bar: Progress) -> dict[str, int]:
    """Equal steps for all mechanisms, as many as the budget holds."""
    line = bar.add_task("how fast this machine is", total=len(config.mechanisms))
    cost = [0.0, 0.0]
    for name in config.mechanisms:
        language, synthetic = seconds_per_step(config, name, corpus)
        cost = [cost[0] + language, cost[1] + synthetic]
        bar.advance(line)
    seconds = 60 * config.minutes
    return {
        "language": max(20, int(SHARES["language"] * seconds / cost[0])),
        "synthetic": max(20, int(SHARES["synthetic"] * seconds / cost[1])),
    }
