"""Activator's block with and without the MLP."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.vision.activator import ActivatorBlock

NAMES = (("unit", "actgu"), ("gate", "proj_1"), (r"\bup\.", "proj_2."), ("down", "proj_3"), ("mlp", "ffn.net"))


@case("b0", "b1", "g0")
def block(g: Vectors) -> None:
    made = ActivatorBlock(g["dim"], g["hidden"], mlp=g.get("mlp", True)).to(g.dtype)
    g.layer(made, **g.fill(made, *NAMES))
