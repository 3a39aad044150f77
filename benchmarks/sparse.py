"""Selected attention against PyTorch's SDPA on a CPU, selection included: ratios in one run, medians of runs taken in turns.

python benchmarks/sparse.py --out benchmarks/results/sparse.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cpu import ratio
from torch import Tensor

import regard
from regard.algebra import Neighborhood, Weighted
from regard.engine import pairs_read
from regard.zoo.sparse.seerattention import SeerAttention

HEADS, DIM = 8, 64


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose neighbours are alike and whose heads look at a few columns, as prompts do; drawn from one seed."""
    torch.manual_seed(0)
    slow = torch.randn(1, HEADS, length // 64, 1, DIM).expand(-1, -1, -1, 64, -1).flatten(2, 3)
    k = 0.7 * slow + 0.7 * torch.randn(1, HEADS, length, DIM)
    q = 0.7 * slow + 0.7 * torch.randn(1, HEADS, length, DIM)
    return q, k, torch.randn(1, HEADS, length, DIM)


def cases(length: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Each runs causal attention with at most a tenth of the pairs."""
    seer = SeerAttention(HEADS, HEADS, DIM, ratio=0.08, block_size=128, rope=False)
    mechanisms = {
        "moba": regard.get("moba", block_size=length // 64, top_k=3),
        "flexprefill": regard.get("flexprefill", block_size=128, min_budget=128, max_budget=length // 32, gamma=0.05),
        "sampleattention (window and columns)": regard.get("sampleattention", alpha=0.2, window_ratio=0.03, row_ratio=0.01),
        "hip": regard.get("hip", mask_k=length // 32, block_q=128, block_k=16, window=128),
        "proxyattn": regard.get("proxyattn", gamma=0.06, block_size=128, stride=16),
        "powerattention": regard.get("powerattention", block_size=128, window_blocks=2),
    }
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        name: (lambda q, k, v, m=m: regard.attend(q, k, v, m, mask=regard.Causal())) for name, m in mechanisms.items()
    }
    return {**found, "seerattention": seer}


@torch.no_grad()
def measured(length: int, repeats: int) -> dict[str, dict[str, float]]:
    q, k, v = inputs(length)
    made = cases(length)
    times = {
        name: ratio(lambda f=f: f(q, k, v), lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), repeats)
        for name, f in made.items()
    }
    found = {}
    for name, f in made.items():
        with pairs_read() as pairs:
            f(q, k, v)
        density = pairs.read / (HEADS * length * (length + 1) / 2)
        found[name] = {"density": round(density, 4), "speed_up": round(1 / times[name]["median"], 2)}
    return found


@torch.no_grad()
def neighbourhood(repeats: int) -> dict[str, float]:
    """13 x 13 on 64 x 64, against dense SDPA over the 4096 tokens."""
    q, k, v = (torch.randn(1, HEADS, 4096, DIM) for _ in range(3))
    mask = Weighted(mask=Neighborhood((64, 64), (13, 13), 1, (1, 1), (False, False)))
    time = ratio(lambda: regard.attend(q, k, v, mask), lambda: F.scaled_dot_product_attention(q, k, v), repeats)
    return {"density": round(169 / 4096, 4), "speed_up": round(1 / time["median"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "shape": [1, HEADS, "L", DIM],
    }
    for length in (8192, 16384):
        result[str(length)] = measured(length, given.repeats)
        for name, one in result[str(length)].items():
            print(length, name, one, flush=True)
    result["neighborhood 13x13 on 64x64"] = neighbourhood(given.repeats)
    print(result["neighborhood 13x13 on 64x64"])
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
