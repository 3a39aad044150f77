"""Flowformer: the modules for both directions, causal, and for reinforcement learning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from golden.vectors import Vectors, case, streamed

import regard


@case("c0", "c1", "c2", "c3", "c4")
def module(g: Vectors) -> None:
    causal = g["kind"] != "normal"
    mechanism = regard.get("flowformer", causal=causal, eps=g["eps"], limit=g["clamp"])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, g(f"{name}_projection.weight"), g(f"{name}_projection.bias"))

    def heads(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, name).unflatten(-1, (g["H"], -1)).transpose(1, 2)

    def close(o: torch.Tensor) -> torch.Tensor:
        return linear(o.transpose(1, 2).flatten(-2), "out")

    sides = {"queries": "query", "keys": "key", "values": "value"}
    leaves = g.leaves(*sides)
    out = close(regard.attend(*(heads(leaves[name], side) for name, side in sides.items()), mechanism))
    g.same(out, "out")
    g.gradients(g.weigh(out), leaves)
    if causal:
        q, k, v = (heads(g(name), side) for name, side in sides.items())
        for pieces in (None, [11, 1, q.shape[2] - 12]):
            out, _ = streamed(lambda q, k, v, s: regard.step(q, k, v, mechanism, s), q, k, v, pieces=pieces)
            g.same(close(out), "out")
