"""RSQ: rounding with weighed inputs on each grid, and importances of tokens."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from golden.vectors import Vectors, case

from regard.adapt.gptq import Grid, gptq
from regard.zoo.systems.rsq import chunks, scaled


@case("g0", "g1", "g2", "g3", "g4", dtypes=(torch.float64,))
def rounding(g: Vectors) -> None:
    texts = [(g(f"x{n}"), g(f"r{n}") / g(f"r{n}").sum() * 20) for n in range(2)]
    gram = sum((x * r[:, None]).T @ x for x, r in texts)
    g.same(gram, "gram")
    grid = Grid(g["bits"], g["symmetric"], g["clip"], group=g["group"], static=g["static"])
    g.same(gptq(g("w"), gram, grid, block=g["block"], order=g["order"]).weight, "out")


@case("w0")
def importance(g: Vectors) -> None:
    g.same(scaled(g("weights").sum((0, 1, 2)), g["low"], g["high"]), "out")


@case("w1", "w2")
def spans(g: Vectors) -> None:
    text = SimpleNamespace(x=torch.zeros(11, 2))
    g.same(chunks(tuple(g["wanted"]), g["of"])(text), "out")  # type: ignore[arg-type]
