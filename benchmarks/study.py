"""The shipped study: every causal mechanism in the small models of `regard compare`, trained longer, with three seeds. Hours of one core.

python benchmarks/study.py --out runs/study.json             goes on where it was stopped; all mechanisms get a seed before the next one
python benchmarks/study.py --out runs/study.json --ship      writes what is finished to src/regard/lab/compare/study.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

import regard
from regard.catalog import records
from regard.errors import RegardError
from regard.lab.compare.config import Config
from regard.lab.compare.jobs import Job, corpus_of, run
from regard.lab.compare.train import seconds_per_step
from regard.lab.files import write_text

STEPS = {"language": 300, "recall": 200}  # of the tasks
SHIPPED = Path(__file__).parent.parent / "src" / "regard" / "lab" / "compare" / "study.json"
# Defaults are made for thousands of tokens; these are cut to the 64 to 128 of the study, where they would be plain softmax otherwise.
CUT = {
    "moba": "block_size=16,top_k=2",
    "swat": "window=32",
    "sparse-transformer": "stride=16,count=4",
    "landmark-attention": "block=15,top_blocks=2",
    "nha": "window=16,slots=16",
    "gsa": "slots=16",
    "nats": "window=16",
    "dma": "window=32",
    "longvq": "codes=32,window=16",
    "transformer-vq": "codes=32,block=16",
    "recurrent-memory-transformer": "chunk=32,slots=8",
    "lalte": "window=16,sinks=2,budget=16",
    "powerattention": "block_size=8,window_blocks=2",
    "ssa": "block_size=8,top_k=3",
}
PLAIN = ("localist-dial",)  # softmax, where nobody gives it rules
LONGEST = 300.0  # seconds of a seed beyond which a mechanism is left out, which is said


def specs() -> list[str]:
    """The settings of every causal mechanism that works in the models of `regard compare`."""
    found = []
    for record in records(None, "works"):
        if record.slug in PLAIN:
            continue
        spec = f"{record.slug}:{CUT[record.slug]}" if record.slug in CUT else record.slug
        try:
            Config((spec,))
        except RegardError:
            continue  # no token mixer of a causal decoder
        found.append(spec)
    return sorted({"softmax", "mqa", *found})


def kept(path: Path) -> dict[str, Any]:
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {
        "steps": STEPS,
        "versions": {"regard": regard.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "mechanisms": {},
    }


def study(path: Path, seeds: int, minutes: float, nice: int) -> None:
    """Runs in turn, each saved when done, until all are or the minutes are over."""
    os.nice(nice)
    torch.set_num_threads(1)
    stop = time.monotonic() + 60 * minutes
    found = kept(path)
    config = Config(("softmax",))
    corpus = corpus_of(config.text, config.needed_bytes)
    found["settings"] = {key: value for key, value in config.as_dict().items() if key in ("seq_len", "dim", "layers", "heads", "batch")}
    for seed in range(seeds):
        for spec in specs():
            one = found["mechanisms"].setdefault(spec, {})
            if "left out" in one:
                continue
            if seed == 0 and not one and (took := seconds(config, spec, corpus)) > LONGEST:
                one["left out"] = f"a seed would take {took:.0f} seconds"
            for task in STEPS:
                if "left out" in one or str(seed) in one.get(task, {}):
                    continue
                if time.monotonic() > stop:
                    return
                try:
                    _, result = run(config, Job(task, spec, seed, STEPS[task]), 1)
                except RegardError as why:
                    result = {"error": str(why)}
                one.setdefault(task, {})[str(seed)] = result
                print(f"{time.strftime('%H:%M:%S')} seed {seed} {spec} {task} {shown(result)}", flush=True)
            write_text(path, json.dumps(found))


def seconds(config: Config, spec: str, corpus: Any) -> float:
    try:
        return sum(steps * seconds_per_step(config, task, spec, corpus) for task, steps in STEPS.items())
    except Exception:  # it is said where it is trained
        return 0.0


def shown(result: dict[str, Any]) -> str:
    return str(result.get("error") or result.get("bits") or result.get("accuracy"))


def ship(path: Path) -> None:
    """What a reader of the study needs: rounded, every fourth point of the curves, no times (the machine was shared)."""
    found = kept(path)
    for one in found["mechanisms"].values():
        for task in STEPS:
            for result in one.get(task, {}).values():
                if "loss" in result:
                    result["loss"] = result["loss"][3::4]
                result.pop("seconds", None)
    write_text(SHIPPED, json.dumps(rounded(found), indent=None, separators=(",", ":")))
    print(f"{SHIPPED}: {SHIPPED.stat().st_size:,} bytes, {len(found['mechanisms'])} mechanisms")


def rounded(x: Any) -> Any:
    if isinstance(x, float):
        return round(x, 5)
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    return [rounded(value) for value in x] if isinstance(x, (list, tuple)) else x


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/study.json"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--ship", action="store_true")
    told = parser.parse_args()
    ship(told.out) if told.ship else study(told.out, told.seeds, told.minutes, told.nice)
