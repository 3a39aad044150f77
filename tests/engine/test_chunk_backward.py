"""The backward pass of chunks written by hand equals autograd through the token-by-token form, states included."""

from __future__ import annotations

import pytest
import torch

from regard.engine.recurrent.chunked import chunked
from regard.engine.recurrent.pose import Scan
from regard.engine.recurrent.step import step


def scan_of(decay: str, delta: bool, length: int, strength: float, batch: int = 2) -> Scan:
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, 3, length, d, dtype=torch.float64) for d in (5, 5, 4))
    k = torch.nn.functional.normalize(k, dim=-1)
    shape = {"none": None, "head": (1, 3, 1, 1), "token": (batch, 3, length, 1), "channel": (batch, 3, length, 5)}[decay]
    logs = None if shape is None else -strength * torch.rand(shape, dtype=torch.float64)
    beta = torch.rand(batch, 3, length, 1, dtype=torch.float64) if delta else None
    return Scan(q, k, v, logs, beta, True)


@pytest.mark.parametrize("length", [1, 37, 64, 1100])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(("decay", "strength"), [("none", 0), ("head", 0.3), ("token", 0.3), ("channel", 0.3), ("channel", 30.0)])
def test_gradients_equal_those_of_steps(decay, strength, delta, length):
    if length > 100 and decay == "channel" and strength > 1:
        length = 140
    scan = scan_of(decay, delta, length, strength)
    state = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    leaves = [x for x in (scan.q, scan.k, scan.v, scan.decay, scan.beta, state) if x is not None]
    for x in leaves:
        x.requires_grad_()
    seeds = torch.randn(2, 3, length, 4, dtype=torch.float64), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    found = []
    for form in (lambda: chunked(scan, state, 16), lambda: step(scan, state)):
        out, end = form()
        found.append([out, end, *torch.autograd.grad((out * seeds[0]).sum() + (end * seeds[1]).sum(), leaves)])
    for mine, truth in zip(*found, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-9)


def test_only_inputs_and_chunk_states_are_kept():
    scan = scan_of("channel", False, 256, 0.1, 1)
    for x in (scan.q, scan.k, scan.v, scan.decay):
        x.requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        chunked(scan, None, 32)
    inputs = scan.q.numel() + scan.k.numel() + scan.v.numel() + scan.decay.numel()
    assert sum(kept) == inputs + 3 * 8 * 5 * 4  # heads, chunks, features, values
