"""Attention rollout and flow."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.analysis.rollout_and_flow import flow, rollout


@case("c0", "c1")
def maps(g: Vectors) -> None:
    a = list(g("a")[:, None].unbind())
    g.same(rollout(a, residual=g["residual"], every_layer=True)[0], "out")
    g.same(flow(a, residual=g["residual"], every_layer=True)[0], "flow")
