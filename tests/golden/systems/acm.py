"""Adaptive computation modules: sums of learners, and the gate."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.nn.conditional import GumbelGate
from regard.zoo.systems.acm import ACM


@case("c0", "c1", "c2", "c3")
def sums(g: Vectors) -> None:
    made = ACM(*(g[name] for name in ("dim", "learners", "block", "act")), bias=g["bias"], detach=g["detach"]).to(g.dtype)
    g.layer(made.outputs, **g.fill(made, without="gate"))
    made.eval()
    for n in range(g["learners"] + 1):
        made.fixed = n
        g.same(made(g("x")), g("out")[:, :, n])


@case("g0", "g1")
def gate(g: Vectors) -> None:
    made = GumbelGate(4, 3, 5, g["depth"], least=g["least"]).to(g.dtype)
    g.fill(made, ("layers", "net"))
    g.same(made.eval()(g("x")), "out")
