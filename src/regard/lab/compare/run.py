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
from ...tasks import Corpus
from ..files import write_text
from .config import Config
from .jobs import Job, Work, corpus_of, text_work, workers_of
from .jobs import results as results_of
from .report import write_report
from .speed import measure
from .train import TASKS
from .verdict import verdict

TIMING = 0.15  # of the budget, for time and memory against length
SLACK = 0.85  # of the time that is left is planned with: machines slow down while one looks away
ENOUGH = {"language": 150, "recall": 100, "copying": 140}  # steps that teach softmax the tasks; all tasks get as many times these
LEAST = 20
MEASURING = {"language": 15, "recall": 8, "copying": 3}  # what making and measuring a model takes, in training steps


def fingerprint(config: Config, corpus: Corpus) -> str:
    """What must be equal for finished results to be taken over."""
    told = {key: value for key, value in config.as_dict().items() if key not in ("out", "mechanisms", "text", "parallel", "backend")}
    digest = hashlib.sha256(bytes(corpus.train[:1_000_000].tolist())).hexdigest()
    return hashlib.sha256((json.dumps(told, sort_keys=True) + digest).encode()).hexdigest()[:16]


def environment() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:42}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn(), console=console
    )


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


def compare(config: Config, resume: bool = False, console: Console | None = None, learn: Work = text_work) -> tuple[dict[str, Any], bool]:
    """Run a comparison and write report.json and report.html in config.out; returns (report, whether it was finished). learn: does a job."""
    console = console or Console(stderr=True)
    corpus = corpus_of(config.text, config.needed_bytes)
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
        "rounds": 0,
        "mechanisms": {name: old.get("mechanisms", {}).get(name, {}) for name in names},
    }

    def save() -> None:
        write_text(path, json.dumps(report, indent=1))

    finished = False
    bar = progress(console)
    try:
        with bar:
            work(config, corpus, report, bar, save, old["rounds"] if old.get("finished") else config.seeds, learn)
        finished = True
    except KeyboardInterrupt:
        console.print("stopped; finished results are kept. Go on with --resume")
    report["verdict"] = verdict(report)
    report["finished"] = finished
    save()
    write_report(report, config.out / "report.html")
    return report, finished


def work(config: Config, corpus: Corpus, report: dict[str, Any], bar: Progress, save: Callable[[], None], seeds: int, learn: Work) -> None:
    """Time and memory against length, how long a step takes, then a round of training for each seed as long as the budget holds."""
    results, start = report["mechanisms"], time.perf_counter()
    budget = 60 * config.minutes
    missing = [name for name, one in results.items() if "speed" not in one]
    if missing:  # timed together: ratios hold within one run
        line = bar.add_task("time and memory against length", total=TIMING * budget)
        for name, one in measure(config, TIMING * budget, lambda done: bar.update(line, completed=done)).items():
            if name in results:
                results[name]["speed"] = one
        bar.update(line, completed=TIMING * budget)
        save()
    if report["steps"] is None:
        report["steps"] = decide(config, bar, budget - (time.perf_counter() - start), learn)
        save()
    number, took, left = 0, 0.0, 0.0
    while number == 0 or (number < seeds and took <= left):  # the last round says what the next one takes
        began = time.perf_counter()
        seed = (config.seed + number) % 2**32
        jobs = [
            Job(task, name, seed, report["steps"][task])
            for task in TASKS
            for name in results
            if str(seed) not in results[name].get(task, {})
        ]
        line = bar.add_task(f"learning, seed {seed}", total=len(jobs))
        for job, found in results_of(config, jobs, learn):
            results[job.spec].setdefault(job.task, {})[str(seed)] = found
            bar.advance(line)
            save()
        number += 1
        report["rounds"] = number
        save()
        took, left = time.perf_counter() - began, budget - (time.perf_counter() - start)


def decide(config: Config, bar: Progress, seconds: float, learn: Work = text_work) -> dict[str, int]:
    """Steps of each task, equal for all mechanisms: what teaches them, and more only where all seeds get more; measured on such runs."""
    start = time.perf_counter()
    jobs = [Job(task, name, config.seed, 0) for task in TASKS for name in config.mechanisms]
    line = bar.add_task("how fast this machine is", total=len(jobs))
    cost = dict.fromkeys(TASKS, 0.0)
    for job, found in results_of(config, jobs, learn):
        if "error" not in found:  # a mechanism that fails fails again when it is trained, and is reported there
            cost[job.task] += found["seconds"]
        bar.advance(line)
    seconds = SLACK * (seconds - (time.perf_counter() - start)) * workers_of(config)
    learning, measuring = (sum(steps[task] * cost[task] for task in TASKS) or 1.0 for steps in (ENOUGH, MEASURING))
    times = max((seconds / config.seeds - measuring) / learning, min(1.0, (seconds - measuring) / learning))
    return {task: max(LEAST, int(times * ENOUGH[task])) for task in TASKS}
