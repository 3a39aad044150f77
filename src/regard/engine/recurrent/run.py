"""Run a prepared scan in one of its forms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import RegardError
from .chunk import both_ways
from .chunked import chunked
from .parallel import parallel
from .pose import Scan
from .step import step

MODES = ("parallel", "chunk", "step")


def run(scan: Scan, mode: str = "chunk", state: Tensor | None = None, chunk_size: int | None = None) -> tuple[Tensor, Tensor | None]:
    """(out (B, H, L, E), state or None). The parallel form neither takes nor gives a state."""
    if mode not in MODES:
        raise RegardError(f"mode={mode!r}; expected one of {', '.join(MODES)}")
    if mode == "parallel" and state is not None:
        raise RegardError("mode='parallel' cannot start from a state; use 'chunk' or 'step'")
    start, column = state, None
    if state is not None and scan.apart is not None:  # the state's last column sums the unturned keys
        start, column = state[..., :-1], state[..., -1:]
    new: Tensor | None = None
    if mode == "parallel":
        out = parallel(scan)
    elif not scan.causal:
        out = both_ways(scan)
    else:
        out, new = chunked(scan, start, chunk_size) if mode == "chunk" else step(scan, start)
    if new is not None and scan.apart is not None:
        fresh = pad(scan.apart[1].sum(-2).unsqueeze(-1), (0, 0, 0, int(scan.mean)))
        new = torch.cat((new, fresh if column is None else fresh + column), -1)
    return finish(scan, out, start, column), new


def finish(scan: Scan, o: Tensor, start: Tensor | None, column: Tensor | None) -> Tensor:
    """The readout, with the moments it asks for."""
    if scan.read is None:
        return o
    mass = mean = None
    if scan.ones:
        o, mass = o[..., :-1], o[..., -1:]
    elif scan.apart is not None:
        q, k = scan.apart
        if scan.causal:
            past = k.cumsum(-2) if column is None else k.cumsum(-2) + column[..., : k.shape[-1], :].transpose(-1, -2)
            mass = (q * past).sum(-1, keepdim=True)
        else:
            mass = q @ k.sum(-2).unsqueeze(-1)
    if scan.mean:
        assert scan.count is not None
        v = (scan.v[..., :-1] if scan.ones else scan.v) * scan.k[..., -1:]
        total = v.cumsum(-2) if scan.causal else v.sum(-2, keepdim=True)
        total = total if start is None else total + start[..., -1:, : v.shape[-1]]
        mean = total / scan.count
    return scan.read(o, mass=mass, mean=mean, n=scan.count, query_sum=scan.q.sum(-1, keepdim=True), causal=scan.causal)
