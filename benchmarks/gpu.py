"""What the GPU benchmarks share: timing, and the file they write."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DRY = os.environ.get("REGARD_DRY") == "1"  # without a GPU: that the script runs, on tiny shapes; its numbers mean nothing
DEVICE = "cpu" if DRY else "cuda"
DTYPE = torch.float32 if DRY else torch.bfloat16
HEADS, DIMS = (2, (16,)) if DRY else (32, (64, 128))


def milliseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """The mean time of `run` on the device, after three runs that warm it up."""
    if DRY:
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    marks[0].record()
    for _ in range(repeats):
        run()
    marks[1].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]) / repeats


def header() -> dict[str, Any]:
    """What the numbers were taken on; without a CUDA device there is nothing to take."""
    if DRY:
        return {"torch": torch.__version__, "device": "none: a dry run"}
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    import triton

    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(),
    }


def with_gradients(run: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward of run(*tensors) for the gradients of all of them."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    seed = torch.randn_like(run(*leaves))
    return lambda: torch.autograd.grad(run(*leaves), leaves, seed)


def write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
