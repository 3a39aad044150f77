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
    bits = one["language"]["valid_bits"]["1"]
    assert 1 < bits < 8, f"{name}: {bits} bits per byte after training"
    assert one["language"]["train_bits"][-1][1] < one["language"]["train_bits"][0][1], f"{name} did not learn"
    assert all(0 <= x <= 1 for x in one["synthetic"]["recall"].values()), name
    assert all(math.isfinite(x) and x > 0 for x in one["speed"]["ratio"]["prefill"].values()), name
state = report["mechanisms"]["gla"]["speed"]["state"]
assert state["1024"] == state["16384"], "GLA's state must not grow with the context"
plots = [p for p in ("loss", "extrapolation", "recall", "prefill", "memory", "decode", "state") if f'<figure id="{p}"><svg' not in page]
assert not plots, f"missing plots: {plots}"
sys.stdout.write(f"report is complete: {report['verdict']}\n")
