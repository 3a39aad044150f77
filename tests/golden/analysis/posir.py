"""PosIR: scores and position sensitivity of 200 queries."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.analysis.posir import report_of


@case("c0")
def report(g: Vectors) -> None:
    found = report_of(g("score"), g.exact("place"), g("lengths"))
    numbers = {"nDCG@10": found.score, "PSI": found.psi}
    numbers |= {f"{name}({q})": value for q, c in found.buckets.items() for name, value in (("nDCG@10", c.score), ("PSI", c.psi))}
    g.same(g("out").new_tensor([numbers[name] for name in g["names"]]), "out")
