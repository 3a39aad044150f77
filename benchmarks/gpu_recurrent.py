"""Recurrent attention on a GPU against flash-linear-attention, where that is installed, and against SDPA: forward, and with backward.

python benchmarks/gpu_recurrent.py --out benchmarks/results/gpu_recurrent.json

Ratios are the peer's time over regard's: above 1 regard is faster. bf16 inputs, B=1, H=32; regard's states and products are float32.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu import DEVICE, DIMS, DRY, DTYPE, HEADS, header, milliseconds, with_gradients, write
from torch import Tensor

import regard

PEERS = {  # regard's name: where the peer's operator is, and its names for regard's inputs
    "gla": ("fla.ops.gla", "chunk_gla", {"log_decay": "g"}),
    "lightning-attention-2": ("fla.ops.simple_gla", "chunk_simple_gla", {"log_decay": "g_gamma"}),
    "deltanet": ("fla.ops.delta_rule", "chunk_delta_rule", {"beta": "beta"}),
}


def case(name: str, length: int, dim: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    q, k, v = (torch.randn(1, HEADS, length, dim, device=DEVICE, dtype=DTYPE) for _ in range(3))
    more = {
        "gla": lambda: {"log_decay": F.logsigmoid(torch.randn(1, HEADS, length, dim, device=DEVICE)) / 16},
        "lightning-attention-2": lambda: {"log_decay": -(2.0 ** (-8 * torch.arange(1, HEADS + 1, device=DEVICE) / HEADS))},
        "deltanet": lambda: {"beta": torch.rand(1, HEADS, length, device=DEVICE)},
    }[name]()
    return [q, F.normalize(k, dim=-1), v], more


def peer(name: str, inputs: dict[str, Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """The peer's operator on (B, H, L, D); None where it is not installed."""
    module, operator, names = PEERS[name]
    try:
        run = getattr(importlib.import_module(module), operator)
    except (ImportError, AttributeError):
        return None
    moved = {names[key]: x.transpose(1, 2) if x.dim() > 1 else x for key, x in inputs.items()}
    return lambda q, k, v: run(*(x.transpose(1, 2) for x in (q, k, v)), **moved)[0].transpose(1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64] if DRY else [2048, 8192, 32768])
    given = parser.parse_args()
    result = header()
    for length in given.lengths:
        for dim in DIMS:
            for name in PEERS:
                tensors, inputs = case(name, length, dim)
                mechanism = regard.get(name)
                runs: dict[str, Callable[..., Tensor] | None] = {
                    "regard": lambda q, k, v, m=mechanism, x=inputs: regard.attend(q, k, v, m, **x),
                    "fla": peer(name, inputs),
                    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                }
                row = {}
                for what, made in (("forward", lambda f, t: lambda: f(*t)), ("both", lambda f, t: with_gradients(f, *t))):
                    times = {who: milliseconds(made(run, tensors)) for who, run in runs.items() if run is not None}
                    row |= {f"{what}_{who}": round(times[who] / times["regard"], 3) for who in times if who != "regard"}
                result.setdefault(f"{length} x {dim}", {})[name] = row
                print(length, dim, name, row, flush=True)
    write(given.out, result)


if __name__ == "__main__":
    main()
