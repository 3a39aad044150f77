"""Speed on a CPU, as ratios to PyTorch's scaled_dot_product_attention in the same run: B=1, H=8, D=64, float32, causal.

    python benchmarks/cpu.py [--lengths 1024 4096 16384] [--rounds 5] [--out FILE]

Runs are taken in turns (mechanism, SDPA, mechanism, ...); each ratio is the median over rounds, with its range. Above 1 is slower.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import regard
from regard.algebra import Selection
from regard.algebra.select import Chosen
from regard.engine import native
from regard.lab.files import write_text
from regard.lab.memory import peak_bytes

HEADS, DIM = 8, 64
LOCAL = ("softmax", "sigmoid", "softpick", "relu", "sparsemax", "entmax")
TILED_UP_TO = 2048  # the tiled executor is slower: its ratios are taken at one length
EXECUTORS = ("native", "tiled")  # what `attend` takes where a C compiler is found, and where none is


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratio(run: Callable[[], object], base: Callable[[], object], rounds: int) -> dict[str, float]:
    run(), base()
    found = sorted(seconds(run) / seconds(base) for _ in range(rounds))
    return {"median": round(statistics.median(found), 3), "low": round(found[0], 3), "high": round(found[-1], 3)}


def tensors(length: int, grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(1, HEADS, length, DIM, requires_grad=grad) for _ in range(3)]


def mechanism_of(name: str) -> regard.Weighted | str:
    return regard.get("entmax", alpha=1.5) if name == "entmax" else name


def executors(length: int) -> tuple[str, ...]:
    return EXECUTORS if length <= TILED_UP_TO else EXECUTORS[:1]


def forward(length: int, rounds: int) -> dict[str, dict[str, float]]:
    q, k, v = tensors(length)
    mask = regard.Causal()

    def base() -> object:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    out = {}
    for executor in executors(length):
        for name in LOCAL:
            mechanism = mechanism_of(name)
            out[f"{executor} {name}"] = ratio(lambda: regard.attend(q, k, v, mechanism, mask=mask, executor=executor), base, rounds)
    out["attend softmax"] = ratio(lambda: regard.attend(q, k, v, "softmax", mask=mask), base, 3 * rounds)
    return out


def backward(length: int, rounds: int) -> dict[str, dict[str, float]]:
    q, k, v = tensors(length, True)
    g = torch.randn_like(q)
    mask = regard.Causal()

    def both(run: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run(), (q, k, v), g)

    base = both(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    out = {}
    for executor in executors(length):
        for name in LOCAL:
            mechanism = mechanism_of(name)
            run = both(lambda: regard.attend(q, k, v, mechanism, mask=mask, executor=executor))
            out[f"{executor} {name}"] = ratio(run, base, rounds)
    return out


def recurrent_inputs(length: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "lightning-attention-2": {},
        "gla": {"log_decay": F.logsigmoid(torch.randn(1, HEADS, length, DIM)) / 16},
        "deltanet": {"beta": torch.rand(1, HEADS, length)},
    }


def recurrent(length: int, rounds: int) -> dict[str, dict[str, float]]:
    q, k, v = tensors(length)
    unit = F.normalize(k, dim=-1)
    out = {}
    for name, more in recurrent_inputs(length).items():
        out[name] = ratio(
            lambda name=name, more=more: regard.attend(q, unit, v, name, **more),
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            rounds,
        )
    return out


def recurrent_backward(length: int, rounds: int) -> dict[str, dict[str, float]]:
    """Forward and backward, gradients of decays and write strengths included."""
    q, k, v = tensors(length, True)
    g, unit = torch.randn_like(q), F.normalize(k.detach(), dim=-1).requires_grad_()
    out = {}
    for name, more in recurrent_inputs(length).items():
        leaves = {key: x.requires_grad_() for key, x in more.items()}
        wanted = (q, unit, v, *leaves.values())
        out[name] = ratio(
            lambda name=name, leaves=leaves, wanted=wanted: torch.autograd.grad(regard.attend(q, unit, v, name, **leaves), wanted, g),
            lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), g),
            rounds,
        )
    return out


def selected(rounds: int) -> dict[str, dict[str, float]]:
    q, k, v = tensors(8192)
    best = torch.rand(1, HEADS, 64, 64).topk(6, -1).indices  # 6 of 64 blocks a row, as selectors with a budget choose them
    keep = torch.zeros(1, HEADS, 64, 64, dtype=torch.bool).scatter_(-1, best, True)
    sparse = regard.Weighted(select=Chosen(lambda q, k, first: Selection(keep, 128, 128)))
    out = {
        "block-sparse, 6 of 64 blocks of 8192": ratio(
            lambda: regard.attend(q, k, v, sparse), lambda: F.scaled_dot_product_attention(q, k, v), rounds
        )
    }
    q, k, v = tensors(16384)
    moba = regard.get("moba", block_size=256, top_k=4)
    out["moba 256 x 4 of 16384"] = ratio(
        lambda: regard.attend(q, k, v, moba), lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), rounds
    )
    return out


def decode(rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of one step after 16384 tokens over those after 1024, for each recurrence."""
    out = {}
    for name in ("lightning-attention-2", "gla", "deltanet"):
        layer = regard.nn.Attention(HEADS * DIM, HEADS, name).eval()
        with torch.no_grad():
            states = [layer.step(torch.randn(1, length, HEADS * DIM))[1] for length in (16384, 1024)]
            token = torch.randn(1, 1, HEADS * DIM)
            out[f"{name}, step at 16384 over 1024"] = ratio(
                lambda: layer.step(token, states[0]), lambda: layer.step(token, states[1]), 20 * rounds
            )
    return out


def memory() -> dict[str, float]:
    q, k, v = tensors(16384)
    used = peak_bytes(lambda: regard.attend(q, k, v, "softpick", mask=regard.Causal()))
    return {"softpick at 16384, share of the materialised matrix": round(used / (HEADS * 16384**2 * 4), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    report: dict[str, dict[str, object]] = {
        "environment": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "vectors": torch.backends.cpu.get_cpu_capability(),
            "block": native.block(),
        },
        "shape": {"batch": 1, "heads": HEADS, "head_dim": DIM, "dtype": "float32", "causal": True},
        "ratio to SDPA": {},
    }

    def keep(group: str, found: dict[str, object], part: str | None = None) -> None:
        """Write what is known so far: a run that is stopped loses one part."""
        report.setdefault(group, {}).update(found if part is None else {part: found})
        if chosen.out:
            write_text(chosen.out, json.dumps(report, indent=1) + "\n")

    q = tensors(64)
    with torch.no_grad():
        short = ratio(
            lambda: [regard.attend(*q, "softmax", mask=MASK) for _ in range(100)],
            lambda: [F.scaled_dot_product_attention(*q, is_causal=True) for _ in range(100)],
            9,
        )
        keep("ratio to SDPA", {"attend softmax": short}, "forward 64")
        keep("ratio to SDPA", selected(chosen.rounds), "selected")
        keep("ratio to SDPA", recurrent(16384, chosen.rounds), "linear 16384")
        keep("decode", decode(chosen.rounds))
        keep("memory", memory())
        for length in chosen.lengths:
            keep("ratio to SDPA", forward(length, chosen.rounds * max(1, 8192 // length)), f"forward {length}")  # short runs vary more
    keep("ratio to SDPA", recurrent_backward(16384, chosen.rounds), "linear 16384, forward+backward")
    for length in (2048, 8192):
        keep("ratio to SDPA", backward(length, max(3, chosen.rounds // 2)), f"forward+backward {length}")
    print(json.dumps(report, indent=1))


MASK = regard.Causal()

if __name__ == "__main__":
    main()
