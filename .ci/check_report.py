"""Check what a comparison wrote: every number and every plot of both mechanisms."""

import json
import math
import sys
from pathlib import Path

folder = Path(sys.argv[1])
report = json.loads((folder / "report.json").read_text())
page = (folder / "report.html").read_text()
assert report["finished"] and set(report["mechanisms"]) == {"softmax", "gla"}, "the comparison did not finish"
for name, one in report["mechanisms"].items():
    for task in ("language", "recall", "copying"):
        runs = one[task].values()
        assert len(runs) == report["rounds"] and not [run for run in runs if "error" in run], f"{name}: {task}"
    for run in one["language"].values():
        assert 1 < run["bits"]["1"] < 8, f"{name}: {run['bits']} bits per byte after training"
        assert run["loss"][-1][1] < run["loss"][0][1], f"{name} did not learn"
    assert all(0 <= x <= 1 for run in one["recall"].values() for x in run["accuracy"].values()), name
    assert all(math.isfinite(x) and x > 0 for x in one["speed"]["ratio"]["prefill"].values()), name
state = report["mechanisms"]["gla"]["speed"]["state"]
assert len(state) > 1 and len(set(state.values())) == 1, "GLA's state must not grow with the context"
plots = [p for p in ("loss", "extrapolation", "recall", "prefill", "memory", "decode", "state") if f'<figure id="{p}"><svg' not in page]
assert not plots, f"missing plots: {plots}"
sys.stdout.write(f"report is complete: {report['verdict']}\n")
