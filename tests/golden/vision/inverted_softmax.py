"""Querybank normalisation: the dynamic inverted softmax."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.vision.inverted_softmax import qb_norm


@case("c0", "c1", "c2", "c3")
def rescored(g: Vectors) -> None:
    g.same(qb_norm(g("sims"), g("bank"), beta=g["beta"], k=g["k"]), "out")
