"""MALA: the core with and without rotary positions, and the vision layer."""

from __future__ import annotations

from golden.vectors import Vectors, case

import regard


def both(g: Vectors, slug: str) -> None:
    if g.config.startswith("f"):
        mechanism = regard.get(slug, grid_width=g["W"] if g["rope"] else None)
        g.op(lambda q, k, v: regard.attend(q, k, v, mechanism))
        return
    dim = g["dim"]
    made = regard.nn.GridAttention(dim, g["heads"], (g["H"], g["W"]), slug).to(g.dtype)
    weight, bias = g("qkvo.weight")[..., 0, 0], g("qkvo.bias")
    for ours, part in (("qkv", slice(0, 3 * dim)), ("gate", slice(3 * dim, None))):
        g.load(made, {f"{ours}.weight": weight[part], f"{ours}.bias": bias[part]})
    g.load(made, {"local": "lepe", "out.weight": g("proj.weight")[..., 0, 0], "out.bias": "proj.bias"})
    g.layer(made)


@case("f0", "f1", "c0", "c1")
def attention(g: Vectors) -> None:
    both(g, "mala")
