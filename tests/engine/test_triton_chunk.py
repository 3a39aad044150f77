"""The chunk kernels equal the token-by-token form in the interpreter, gradients and states included, and compile for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import torch
from dataclasses import replace
from test_chunk_backward import scan_of
from regard.engine.recurrent.chunked import on_device
from regard.engine.recurrent.chunked import chunked
from regard.engine.recurrent.step import step

NAMES = ("q", "k", "v", "decay", "beta")
for decay, strength, delta in {cases}:
    wide = scan_of(decay, delta, 37, strength, 1)
    results = []
    for form, dtype in ((lambda s, x: chunked(s, x, 16), torch.float32), (step, torch.float64)):
        torch.manual_seed(1)
        scan = replace(wide, **{{n: None if x is None else x.float().to(dtype).requires_grad_() for n, x in vars(wide).items() if n in NAMES}})
        state = torch.randn(1, 3, 5, 4).to(dtype).requires_grad_()
        assert (on_device(scan) is not None) == (dtype == torch.float32)
        leaves = [x for x in (scan.q, scan.k, scan.v, scan.decay, scan.beta, state) if x is not None]
        out, end = form(scan, state)
        results.append([out, end, *torch.autograd.grad(out.sin().sum() + end.cos().sum(), leaves)])
    for mine, truth in zip(*results, strict=True):
        assert (mine - truth).abs().max() < 1e-4 * max(1.0, float(truth.abs().max())), (decay, delta, float((mine - truth).abs().max()))
print("equal")
"""

CASES = {
    "no decay": [("none", 0, False), ("none", 0, True)],
    "a decay a head or token": [("head", 0.3, False), ("token", 0.3, True), ("token", 30.0, False)],
    "a decay a channel": [("channel", 0.3, False), ("channel", 0.3, True)],
    "too strong for two factors": [("channel", 30.0, True)],
}


def run(script: str, **env: str) -> str:
    around = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), **env}
    done = subprocess.run([sys.executable, "-c", script], env=around, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_steps(name):
    assert "equal" in run(SCRIPT.format(cases=CASES[name]), TRITON_INTERPRET="1")


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from regard.engine.triton import chunk_kernels as kernels

NAMES = ("solve_chunks", "run_states", "read_chunks", "told_back", "run_states_back", "chunks_back")
for kind, delta in ((0, 0), (1, 1), (2, 1), (3, 0)):
    sizes = dict(KIND=kind, DELTA=delta, C=16, F=32, E=32, BV=32)
    for name in NAMES if delta else [name for name in NAMES if name not in ("solve_chunks", "told_back")]:
        kernel = getattr(kernels, name)
        kinds = {n: "constexpr" if n in sizes else "i32" if n == "N" else "*fp32" for n in kernel.arg_names}
        given = {n: x for n, x in sizes.items() if n in kernel.arg_names}
        assert "cubin" in compile(ASTSource(fn=kernel, signature=kinds, constexprs=given), target=GPUTarget("cuda", 80, 32), options={"num_stages": 1}).asm
print("compiled")
"""


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    assert "compiled" in run(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
