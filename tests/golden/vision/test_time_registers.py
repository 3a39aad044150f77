"""Test-time registers: what becomes of the units' activations."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.nn.images.register_tokens import Registers


@case("c0", "c1", "c2", "c3", "c4")
def rewritten(g: Vectors) -> None:
    made = Registers({0: g["units"]}, g["count"], g["scale"], g["patches"], shared=True)
    g.same(made.rewritten(g("act"), g["units"]), "out")
