"""`regard compare --task digits` (or another of `pictures.TASKS`): the same small net with each layer in its slots, trained on the same images, measured, with a report."""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ...errors import RegardError
from ...plots import figure
from ..files import prepare, write_text
from .config import BACKENDS
from .jobs import Job, results, workers_of
from .pictures import TASKS
from .report import learning, page, sortable
from .run import SLACK, environment, progress, resumed
from .slots import PLAIN, fitting, net_of
from .statistics import Estimate, estimate, measure
from .train import thinned
from .verdict import told

LEAST, SOME, ENOUGH = 20, 80, 400  # steps: at the least; for another seed to be better than more of them; at the most
MEASURING = 20  # what making and measuring a net takes, in training steps
RATE, TESTED = 5e-3, 1000
LEARNED = 0.6  # accuracy that the best must reach before a comparison says anything


@dataclass(frozen=True)
class VisionConfig:
    """layers: names, with hyperparameters as "name:key=value,key=value"; the net without any is always measured too, as "none". minutes: the budget of all
    of it. side: of the images, in pixels (0: the task's usual one); widths: of the net's blocks. steps: of each run (None: as many as the budget holds, at most 400)."""

    layers: tuple[str, ...]
    task: str = "digits"
    minutes: float = 4.0
    out: Path = Path("runs/compare")
    seed: int = 0
    seeds: int = 3
    side: int = 0
    widths: tuple[int, ...] = (16, 32)
    batch: int = 32
    steps: int | None = None
    parallel: int | None = None
    backend: str = "loky"

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise RegardError(f"--task {self.task}: expected text or one of {', '.join(TASKS)}")
        task = TASKS[self.task]
        object.__setattr__(self, "side", self.side or task.side)
        if len({PLAIN, *self.layers}) < len(self.layers) + 1:
            twice = next(name for name in self.layers if name == PLAIN or self.layers.count(name) > 1)
            raise RegardError(f"layer {twice!r} is given twice; name each once, and {PLAIN!r}, the net without any, not at all")
        if not (math.isfinite(self.minutes) and 0 < self.minutes <= 10_000):
            raise RegardError(f"--minutes {self.minutes:g}: expected a positive number up to 10000")
        if not 1 <= self.seeds <= 100 or not 0 <= self.seed < 2**32:
            raise RegardError(f"--seeds {self.seeds}, --seed {self.seed}: expected 1 to 100, and 0 to 4294967295")
        if self.parallel is not None and not 1 <= self.parallel <= 1024:
            raise RegardError(f"--parallel {self.parallel}: expected between 1 and 1024")
        if self.backend not in BACKENDS:
            raise RegardError(f"--backend {self.backend}: expected one of {', '.join(BACKENDS)}")
        if self.side < task.side or not self.widths or (self.steps is not None and self.steps < 1):
            raise RegardError(
                f"side={self.side}, widths={self.widths}, steps={self.steps}; expected at least {task.side} for {self.task}, one or more, and 1 or more"
            )
        for spec in self.layers:
            net_of(spec, self.side, self.widths, task.classes)  # says why a layer does not fit

    @property
    def specs(self) -> list[str]:
        return [PLAIN, *self.layers]

    def as_dict(self) -> dict[str, Any]:
        shown = {**asdict(self), "out": str(self.out)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in shown.items()}


def drawn(config: VisionConfig, count: int, generator: torch.Generator, held_out: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return TASKS[config.task].draw(count, generator, config.side, held_out)


def net(config: VisionConfig, spec: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return net_of(spec, config.side, config.widths, TASKS[config.task].classes)


def fit(config: VisionConfig, spec: str, seed: int, steps: int) -> tuple[nn.Module, list[float]]:
    model, generator = net(config, spec, seed).train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    losses = []
    for _ in range(steps):
        x, y = drawn(config, config.batch, generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return model.eval(), losses


def work(config: Any, job: Job) -> dict[str, Any]:
    """A run's measures and the curve of its loss; with steps 0 only what a step takes."""
    if not job.steps:
        times = []
        for steps in (1, 4):
            start = time.perf_counter()
            fit(config, job.spec, job.seed, steps)
            times.append(time.perf_counter() - start)
        return {"seconds": max(1e-4, (times[1] - times[0]) / 3)}
    start = time.perf_counter()
    model, losses = fit(config, job.spec, job.seed, job.steps)
    x, y = drawn(config, TESTED, torch.Generator().manual_seed(config.seed + 2**20), held_out=True)
    with torch.no_grad():
        right = torch.cat([model(part).argmax(-1) for part in x.split(100)]) == y
    return {"accuracy": float(right.float().mean()), "steps": job.steps, "loss": thinned(losses), "seconds": time.perf_counter() - start}


def size(config: VisionConfig, spec: str) -> dict[str, Any]:
    """Parameters, and operations of one image, products and convolutions alone."""
    model = net(config, spec, config.seed).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, config.side, config.side))
    return {"parameters": sum(p.numel() for p in model.parameters()), "flops": counter.get_total_flops()}


def timed(config: VisionConfig, rounds: int = 7) -> dict[str, float]:
    """Seconds of a training step and of an evaluation of a batch, medians of runs taken in turns, of each net over the plain one's."""
    nets, x = {spec: net(config, spec, config.seed) for spec in config.specs}, torch.randn(config.batch, 3, config.side, config.side)
    found: dict[str, list[float]] = {spec: [] for spec in nets}
    for at in range(rounds + 1):
        for spec, model in nets.items():
            start = time.perf_counter()
            model(x).sum().backward()
            if at:  # the first is a warm-up
                found[spec].append(time.perf_counter() - start)
    middle = {spec: statistics.median(values) for spec, values in found.items()}
    return {spec: value / middle[PLAIN] for spec, value in middle.items()}


def verdict(report: dict[str, Any]) -> str:
    found = {spec: value for spec, one in report["mechanisms"].items() if (value := measure(one, report["config"]["task"], "accuracy"))}
    failed = [
        f"{spec} failed ({run['error']})."
        for spec, one in report["mechanisms"].items()
        for run in list(one.get(report["config"]["task"], {}).values())[:1]
        if "error" in run
    ]
    if not found:
        return " ".join([*failed, "Nothing was finished."])
    best = max(value.mean for value in found.values())
    short = [f"Too little training to compare: the best is right {best:.0%} of the time; give it more --minutes."] if best < LEARNED else []
    closing = (
        "Small nets; ± is the 95% interval over seeds."
        if report["rounds"] > 1
        else "Small nets and one seed: no difference is told from chance."
    )
    return " ".join([*short, *failed, told(f"Accuracy after {report['steps']} steps", found, False, ".1%"), closing])


def rows(report: dict[str, Any]) -> tuple[list[str], list[list[tuple[str, float | str]]]]:
    """The table: what stands in the slot, accuracy, parameters, operations and time."""
    heads = ["in the slot", "accuracy", "parameters", "MFLOPs an image", "time of a step"]
    lines = []
    for spec, one in report["mechanisms"].items():
        value: Estimate | None = measure(one, report["config"]["task"], "accuracy")
        line: list[tuple[str, float | str]] = [(spec, spec), ("-", "") if value is None else (value.text(".1%"), value.mean)]
        line += [(f"{one['parameters']:,}", one["parameters"]), (f"{one['flops'] / 1e6:.2f}", one["flops"])]
        lines.append([*line, ("-", "") if "time" not in one else (f"{one['time']:.2f}x", one["time"])])
    return heads, lines


def write(report: dict[str, Any], out: Path) -> None:
    """report.json, report.html and table.md."""
    config, env = report["config"], report["environment"]
    heads, lines = rows(report)
    told_of = (
        f"{config['task']}, {config['side']} x {config['side']} pixels; blocks of {config['widths']} channels, {report['steps']} steps of {config['batch']}, "
        f"{report['rounds']} seeds from {config['seed']}; PyTorch {env['torch']}"
        + ("" if report["finished"] else "; stopped before the end")
    )
    curves = {spec: points for spec, one in report["mechanisms"].items() if (points := learning(config["task"])(one))}
    cost = {
        spec: [(one["parameters"], value.mean, value.low, min(1.0, value.high))]
        for spec, one in report["mechanisms"].items()
        if (value := measure(one, config["task"], "accuracy")) is not None
    }
    plots = [
        ("loss", "How fast does it learn?", "steps", "cross entropy", curves, False),
        ("size", "What does a parameter buy?", "parameters", "accuracy", cost, True),
    ]
    figures = [f'<figure id="{key}">{figure(title, x, y, found, log, False)}</figure>' for key, title, x, y, found, log in plots if found]  # type: ignore[arg-type]
    note = "Time of a training step over that of the net without anything in its slots; operations of products and convolutions. Click a column to sort by it."
    write_text(out / "report.json", json.dumps(report, indent=1))
    write_text(
        out / "report.html",
        page("Which layer?", list(report["mechanisms"]), told_of, report["verdict"], sortable(heads, lines), note, figures),
    )
    table = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    write_text(out / "table.md", "\n".join([*table, *("| " + " | ".join(text for text, _ in line) + " |" for line in lines)]) + "\n")


def decided(config: VisionConfig, cost: float, seconds: float) -> tuple[int, int]:
    """(steps, rounds), equal for all, of what a step of all nets takes and the seconds there are."""
    seconds *= SLACK * workers_of(config)
    rounds = max(1, min(config.seeds, int(seconds / (cost * ((config.steps or SOME) + MEASURING)))))
    return config.steps or max(LEAST, min(ENOUGH, int(seconds / rounds / cost) - MEASURING)), rounds


def compare_layers(config: VisionConfig, resume: bool = False, console: Console | None = None) -> tuple[dict[str, Any], bool]:
    """Run a comparison and write report.json, report.html and table.md in config.out; returns (report, whether it was finished).

    resume: what is there is kept, and seeds that are not are added, as far as the minutes go, with as many steps."""
    start, budget = time.perf_counter(), 60 * config.minutes
    free = ("out", "layers", "parallel", "backend", "minutes", "seeds")  # what may differ when a run is gone on with
    kept = {key: value for key, value in config.as_dict().items() if key not in free}
    mark, path = json.dumps(kept, sort_keys=True), config.out / "report.json"
    old = resumed(path, mark) if resume else {}
    prepare(config.out, f"--out {config.out}")
    ones = {spec: {**size(config, spec), **old.get("mechanisms", {}).get(spec, {})} for spec in config.specs}
    report: dict[str, Any] = {
        "fingerprint": mark,
        "config": config.as_dict(),
        "environment": environment(),
        "mechanisms": ones,
        "finished": False,
    }
    report |= {"steps": old.get("steps"), "rounds": config.seeds}
    try:
        with progress(console or Console(stderr=True)) as bar:
            for spec, ratio in timed(config).items():
                ones[spec]["time"] = ratio
            if report["steps"] is None:
                probes = [Job(config.task, spec, config.seed, 0) for spec in config.specs]
                cost = sum(found.get("seconds", 0.0) for _, found in results(config, probes, work))
                report["steps"], report["rounds"] = decided(config, cost or 1e-3, budget - (time.perf_counter() - start))
            for number in range(report["rounds"]):
                began = time.perf_counter()
                seed = (config.seed + number) % 2**32
                jobs = [Job(config.task, spec, seed, report["steps"]) for spec in ones if str(seed) not in ones[spec].get(config.task, {})]
                line = bar.add_task(f"learning, seed {seed}", total=len(jobs))
                for job, found in results(config, jobs, work):
                    ones[job.spec].setdefault(job.task, {})[str(seed)] = found
                    bar.advance(line)
                    write_text(path, json.dumps(report, indent=1))
                took, left = time.perf_counter() - began, budget - (time.perf_counter() - start)
                if jobs and number + 1 < report["rounds"] and took > left:
                    report["rounds"] = number + 1
                    break
        report["finished"] = True
    except KeyboardInterrupt:
        if console is not None:
            console.print("stopped; finished results are kept. Go on with --resume")
    report["verdict"] = verdict(report)
    write(report, config.out)
    return report, report["finished"]


__all__ = ["VisionConfig", "compare_layers", "estimate", "fitting"]
