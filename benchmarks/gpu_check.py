"""Every Triton kernel against the float64 reference: values and gradients, by dtype and head size. Lines of JSON, one a case.

python benchmarks/gpu_check.py --group weighted            on a card
REGARD_DRY=1 python benchmarks/gpu_check.py --group scans  by Triton's interpreter, a few tiny cases
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from gpu import DEVICE, DRY
from torch import Tensor

import regard
from regard import Causal, Sinks, Window

LIMITS = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 6e-3}  # of the largest value; float32 products run in TF32 on a card
WEIGHTED = ("softmax", "sigmoid", "relu", "softpick", "sparsemax", "entmax", "cog-attention", "ssmax")
SCANS = ("gla", "lightning-attention-2", "deltanet", "lightning-attention", "transnormerllm")
Case = tuple[str, list[Tensor], dict[str, Tensor], Any, Any]


def tensors(length: int, dim: int, dtype: torch.dtype, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length + dim)
    return [torch.randn(2, h, length, dim, generator=generator).to(DEVICE, dtype) for h in (heads, kv_heads, kv_heads)]


def weighted() -> Iterator[Case]:
    sizes = itertools.product((70,) if DRY else (77, 1024), (16,) if DRY else (64, 128), (torch.float32,) if DRY else tuple(LIMITS))
    for (length, dim, dtype), name in itertools.product(sizes, WEIGHTED[:2] if DRY else WEIGHTED):
        for mask in (Causal(),) if DRY else (Causal(), Causal() & (Window(40) | Sinks(4))):
            yield name, tensors(length, dim, dtype), {}, mask, regard.get(name)


def scans() -> Iterator[Case]:
    sizes = itertools.product((70,) if DRY else (77, 1024), (16,) if DRY else (64, 128), (torch.float32,) if DRY else tuple(LIMITS))
    for (length, dim, dtype), name in itertools.product(sizes, SCANS[:2] if DRY else SCANS):
        q, k, v = tensors(length, dim, dtype, 4, 4)
        more = {
            "gla": {"log_decay": F.logsigmoid(torch.randn(2, 4, length, dim, device=DEVICE)) / 16},
            "deltanet": {"beta": torch.rand(2, 4, length, device=DEVICE)},
        }.get(name, {})
        yield name, [q, F.normalize(k.float(), dim=-1).to(dtype), v], more, Causal(), regard.get(name)


GROUPS: dict[str, tuple[Callable[[], Iterator[Case]], str | None]] = {"weighted": (weighted, "triton"), "scans": (scans, None)}


def compared(case: Case, executor: str | None) -> dict[str, Any]:
    """The largest differences from the reference, as shares of its largest values."""
    _, given, inputs, mask, mechanism = case
    found = []
    for chosen, cast in ((executor, lambda x: x), ("reference", torch.Tensor.double)):
        leaves = [cast(x.detach()).requires_grad_() for x in given]
        more = {key: cast(x.detach()) for key, x in inputs.items()}
        out = regard.attend(*leaves, mechanism, mask=mask, executor=chosen, **more)
        found.append([out, *torch.autograd.grad(out.double().square().sum(), leaves)])
    gaps = [float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-9)) for a, b in zip(*found, strict=True)]
    limit = LIMITS[given[0].dtype]
    return {"gaps": [round(gap, 7) for gap in gaps], "right": all(gap <= limit for gap in gaps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group", choices=sorted(GROUPS), required=True)
    parser.add_argument("--seconds", type=float, default=120.0)
    asked = parser.parse_args()
    cases, executor = GROUPS[asked.group]
    start = time.perf_counter()
    for case in cases():
        if time.perf_counter() - start > asked.seconds:
            break
        q = case[1][0]
        line: dict[str, Any] = {"case": case[0], "q": list(q.shape), "dtype": str(q.dtype).removeprefix("torch."), "mask": repr(case[3])}
        try:
            line |= compared(case, executor)
        except Exception:
            line |= {"right": False, "error": traceback.format_exc(limit=-2)[-600:]}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
