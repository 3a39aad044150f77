"""Moment probing: on tokens and on maps, all choices of pairs, and PSRP."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

from regard.zoo.vision.moment_probing import PSRP, MomentProbe

NAMES = ((r"second\.proj", "proj"), (r"second\.norm", "ln"), (r"second\.convs", "downblocks.0"), ("head", "classifier"))


@case("v0", "v1", "v2", "v3")
def tokens(g: Vectors) -> None:
    made = MomentProbe(g["dim"], g["classes"], g["proj"], g["heads"], g["pairs"]).to(g.dtype)
    parameters, leaves = g.fill(made, *NAMES), g.leaves("tokens", "first")
    out = made(leaves["tokens"], leaves["first"])
    g.same(out, "out")
    g.gradients(g.weigh(out), leaves | parameters)


@case("c0", "c1")
def maps(g: Vectors) -> None:
    """A head has every heads-th channel there, a run of them here."""
    made = MomentProbe(g["dim"], g["classes"], g["proj"], g["heads"], g["pairs"], mean_norm=True).to(g.dtype)
    order = torch.arange(g["proj"]).view(-1, g["heads"]).T.flatten()
    for leaf in ("weight", "bias"):
        g.arrays[f"proj.{leaf}_{g.config}"] = g(f"proj.{leaf}")[order].numpy()
    g.fill(made, ("^norm", "cls_.norm"), ("^head1", "cls_.fc"), *NAMES, ("^cls_", "cls_head"))
    g.layer(lambda x: made(x.flatten(2).mT))


@case("p0")
def scales(g: Vectors) -> None:
    made = PSRP(g["dim"], g["rank"]).to(g.dtype)
    g.layer(lambda x: made(x)[0], **g.fill(made, ("scale", "up_weight"), ("shift", "up_bias")))
    g.same(made(g("x"))[1], "shift")
