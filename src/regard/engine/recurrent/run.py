"""Run a prepared scan in one of its forms."""

from __future__ import annotations

from torch import Tensor

from ...errors import RegardError
from .chunk import chunked
from .parallel import parallel
from .pose import Scan
from .step import step

MODES = ("parallel", "chunk", "step")


def run(scan: Scan, mode: str = "chunk", state: Tensor | None = None, chunk_size: int | None = None) -> tuple[Tensor, Tensor | None]:
    """(out (B, H, L, E), state or None). The parallel form neither takes nor gives a state."""
    if not scan.causal:
        if mode == "parallel":
            return scan.finish(parallel(scan)), None
        return scan.finish(scan.q @ (scan.k.transpose(-1, -2) @ scan.v)), None
    if mode == "parallel":
        if state is not None:
            raise RegardError("mode='parallel' cannot start from a state; use 'chunk' or 'step'")
        return scan.finish(parallel(scan)), None
    if mode not in MODES:
        raise RegardError(f"mode={mode!r}; expected one of {', '.join(MODES)}")
    out, state = chunked(scan, state, chunk_size) if mode == "chunk" else step(scan, state)
    return scan.finish(out), state
