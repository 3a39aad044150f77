"""Tropical attention with and without its projections and shift, the max-plus product, shortest paths."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

import regard

OPTIONS = {"c0": {}, "c1": {"tropical_norm": True}, "c2": {"tropical_norm": True, "symmetric": False}, "c3": {"tropical_proj": False}}


@case(*OPTIONS)
def layer(g: Vectors) -> None:
    made = regard.nn.TropicalAttention(12, 3, **OPTIONS[g.config]).to(g.dtype)
    watched = {"out.weight": made.out.weight}
    if g.has("query_trop.W"):
        watched |= {f"{theirs}_trop.W": getattr(made, theirs[0]).weight for theirs in ("query", "key", "value")}
    if g.has("lambda_param"):
        watched["lambda_param"] = made.shift
    for name, parameter in watched.items():
        g.put(parameter, name)
    x = g.leaf("x")
    out, scores = made(x)
    g.same(out, "out")
    g.same(scores, "scores")
    g.gradients(g.weigh(out), {"x": x, **watched})


@case("c4")
def product(g: Vectors) -> None:
    g.same(regard.nn.maxplus_matmul(g("A"), g("B")), "C")


@case("c5", dtypes=[torch.float64])
def shortest_paths(g: Vectors) -> None:
    for factor in (1.0, 1000.0):
        d = -g("W")[0] * factor
        for _ in range(6):
            d = regard.nn.maxplus_matmul(-g("W").T * factor, d[:, None])[:, 0]
        g.same(d, -g("dist_from_0") * factor, 0.0)
