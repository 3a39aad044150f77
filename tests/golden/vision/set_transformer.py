"""Set Transformer: its blocks, and the released net with two blocks behind the pooling."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.vision.set_transformer import ISAB, MAB, PMA, SetTransformer

BLOCK = tuple((rf"(^|\.){ours}\.", rf"\1{theirs}.") for ours, theirs in (("q", "fc_q"), ("k", "fc_k"), ("v", "fc_v"), ("out", "fc_o")))
BLOCK += (("norm1", "ln0"), ("norm2", "ln1"))
POINTS = (("points", "I"), ("gather", "mab0"), ("spread", "mab1"), ("seeds", "S"))


@case("m0", "m1")
def block(g: Vectors) -> None:
    made, leaves = MAB(*g["sizes"], g["heads"], g["norm"]).to(g.dtype), g.leaves("x", "y")
    parameters = g.fill(made, *BLOCK)
    out = made(**leaves)
    g.same(out, "out")
    g.gradients(g.weigh(out), leaves | parameters)


@case("i0", "p0")
def learned_points(g: Vectors) -> None:
    made = (ISAB(3, 4, 2, g["inducing"]) if g.config == "i0" else PMA(4, 2, g["seeds"], True)).to(g.dtype)
    g.layer(made, **g.fill(made, *POINTS, *BLOCK))


@case("n0", "n1")
def net(g: Vectors) -> None:
    made = SetTransformer(3, 5, 4, 2, 2, 2, g["norm"], mixers=2).to(g.dtype)
    names = ((r"^encoder", "enc"), (r"^pool", "dec.0"), (r"^mix\.0", "dec.1"), (r"^mix\.1", "dec.2"), (r"^head", "dec.3"))
    g.layer(made, **g.fill(made, *names, *POINTS, *BLOCK))
