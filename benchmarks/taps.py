"""What taps cost on a real model: python benchmarks/taps.py --out benchmarks/results/taps.json

Seconds of one processor, the least of several runs that take turns with the untapped forward, so that what else runs on the machine falls on both; and
the growth of the process's peak memory while the tapped forward runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from regard import models, taps
from regard.lab.files import write_text
from regard.taps import ColumnMass


def peak() -> int:
    """Bytes of the process's peak since the last call (Linux)."""
    status = Path("/proc/self/status").read_text()
    found = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    Path("/proc/self/clear_refs").write_text("5")
    return found


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@torch.no_grad()
def ratio(model: torch.nn.Module, ids: torch.Tensor, points: Any, layers: list[int] | None, repeats: int) -> dict[str, float]:
    def plain() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    def tapped() -> None:
        with taps.read(model, points, layers=layers):
            plain()

    plain()
    peak()
    plain()
    without = peak()
    tapped()
    more = peak() - without
    pairs = [(seconds(plain), seconds(tapped)) for _ in range(repeats)]
    own, other = (min(x) for x in zip(*pairs, strict=True))
    return {"plain_s": own, "tapped_s": other, "ratio": other / own, "more_mb": more / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--long", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/taps.json"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = models.load(asked.model)
    draw = torch.Generator().manual_seed(0)
    short, long = (torch.randint(model.config.vocab_size, (1, n), generator=draw) for n in (asked.tokens, asked.long))
    last = model.config.num_hidden_layers - 1
    cases: dict[str, tuple[torch.Tensor, Any, list[int] | None, int]] = {
        f"weights of 2 layers, {asked.tokens} tokens": (short, "weights", [last // 3, 2 * last // 3], asked.repeats),
        f"q, k, v, heads of all layers, {asked.tokens} tokens": (short, ["q", "k", "v", "heads"], None, asked.repeats),
        f"column masses of all heads, {asked.long} tokens": (long, ColumnMass(), None, 1 + asked.repeats // 6),
    }
    found = {}
    for name, (ids, points, layers, repeats) in cases.items():
        found[name] = ratio(model, ids, points, layers, repeats)
        print(name, {key: round(x, 3) for key, x in found[name].items()}, flush=True)
        write_text(asked.out, json.dumps({"torch": torch.__version__, "model": asked.model, "threads": 1, "results": found}, indent=1))


if __name__ == "__main__":
    main()
