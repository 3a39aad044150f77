"""Every weighted system of the catalogue against scaled_dot_product_attention in the same run: B=1, H=8, D=64, float32, causal.

    python benchmarks/weighted.py [--names softpick nap ...] [--rounds 5] [--out FILE]

Forward at 2048 and 8192 tokens, forward and backward at 2048, in the executor that the planner chooses. Ratios are medians of runs taken in
turns, with their range; above 1 is slower.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from cpu import ratio, tensors

import regard
from regard.algebra import Weighted
from regard.algebra.mechanism import Hybrid
from regard.engine import native
from regard.lab.files import write_text

SLOW = ("neural-attention", "tapa")  # a pair costs more than a product: measured at 2048 alone, once


def weighted_names() -> list[str]:
    found = [(name, regard.get(name)) for name in regard.names()]
    return [name for name, one in found if isinstance(one, (Weighted, Hybrid)) and (one.can_be_causal or one.causal_only)]


def inputs_of(mechanism: Weighted, length: int) -> dict[str, torch.Tensor]:
    """What the layer would pass where an input has no default."""
    made = {}
    for item in mechanism.declared:
        if item.default is None and item.layer is not None:
            init = item.layer.init  # type: ignore[union-attr]
            sizes = regard.algebra.Sizes(1, 8, 8, length, length, 64, 64)
            made[item.name] = init(sizes) if callable(init) else torch.tensor(float(init))
    return made


def measure(name: str, rounds: int) -> dict[str, object]:
    mechanism, mask = regard.get(name), regard.Causal()
    out: dict[str, object] = {}
    for length in (2048,) if name in SLOW else (2048, 8192):
        q, k, v = tensors(length)
        made = inputs_of(mechanism, length)  # type: ignore[arg-type]
        out["executor"] = regard.plan(q, k, v, mechanism, mask=mask, **made).executor
        with torch.no_grad():
            out[f"forward {length}"] = ratio(
                lambda: regard.attend(q, k, v, mechanism, mask=mask, **made),
                lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                rounds,
            )
    q, k, v = tensors(2048, True)
    g, made = torch.randn_like(q), inputs_of(mechanism, 2048)  # type: ignore[arg-type]
    out["forward+backward 2048"] = ratio(
        lambda: torch.autograd.grad(regard.attend(q, k, v, mechanism, mask=mask, **made), (q, k, v), g, allow_unused=True),
        lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), g),
        rounds,
    )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    environment |= {"vectors": torch.backends.cpu.get_cpu_capability(), "block": native.block()}
    report: dict[str, object] = {"environment": environment, "ratio to SDPA": {}}
    for name in chosen.names or weighted_names():
        report["ratio to SDPA"][name] = measure(name, 1 if name in SLOW else chosen.rounds)  # type: ignore[index]
        print(name, json.dumps(report["ratio to SDPA"][name]), flush=True)  # type: ignore[index]
        if chosen.out:
            write_text(chosen.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
