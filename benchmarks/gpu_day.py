"""Everything a lent GPU is asked, most important first, in a few minutes: right numbers, then speed against the peers that are there.

python benchmarks/gpu_day.py --minutes 8 --out benchmarks/results/gpu_day.json
python benchmarks/gpu_day.py --dry --out dry.json     end to end without a GPU: Triton's interpreter, tiny shapes

Each group is a process of its own with its share of the time, so that a kernel that crashes or hangs takes only its group along; the results are written
after each group.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# name, script and arguments, share of the time
GROUPS: tuple[tuple[str, list[str], float], ...] = (
    ("weighted kernels", ["gpu_check.py", "--group", "weighted"], 0.2),
    ("scan kernels", ["gpu_check.py", "--group", "scans"], 0.2),
    ("weighted speed", ["gpu_weighted.py", "--lengths", "8192"], 0.25),
    ("recurrent speed", ["gpu_recurrent.py", "--lengths", "8192"], 0.2),
    ("selected speed", ["gpu_sparse.py", "--lengths", "16384"], 0.15),
)


def run(name: str, command: list[str], seconds: float, dry: bool) -> dict[str, Any]:
    """A group's result: what it wrote, or printed line by line, and how it ended."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), str(HERE), os.environ.get("PYTHONPATH", "")])}
    if dry:
        environment |= {"REGARD_DRY": "1", "TRITON_INTERPRET": "1"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        arguments = list(command) if command[0] == "gpu_check.py" else [*(command[:1] if dry else command), "--out", str(file)]
        if command[0] == "gpu_check.py":
            arguments += ["--seconds", f"{0.8 * seconds:.0f}"]
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(HERE / arguments[0]), *arguments[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        try:
            text, ended = process.communicate(timeout=seconds)[0], f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            text, ended = process.communicate()[0], "ran out of time"
        result: dict[str, Any] = {"ended": ended, "seconds": round(time.perf_counter() - start, 1)}
        lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"case"')]
        if lines:
            result |= {"right": sum(line["right"] for line in lines), "of": len(lines), "wrong": [x for x in lines if not x["right"]]}
        if file.exists():
            result["found"] = json.loads(file.read_text(encoding="utf-8"))
        if process.returncode:
            result["last_words"] = text[-2000:]
        print(name, {key: value for key, value in result.items() if key not in ("found", "last_words")}, flush=True)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    start, results = time.perf_counter(), {}
    for at, (name, command, share) in enumerate(GROUPS):
        left = 60 * asked.minutes - (time.perf_counter() - start)
        rest = sum(one[2] for one in GROUPS[at:])
        results[name] = run(name, command, max(5.0, left * share / rest), asked.dry)
        part = asked.out.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        part.replace(asked.out)
    if any(one["ended"] != "exit status 0" or one.get("wrong") for one in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
