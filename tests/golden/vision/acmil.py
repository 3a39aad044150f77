"""ACMIL by gated and by multi-head attention, with masking and the loss."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

from regard.zoo.vision.acmil import ACMIL, Branches, MultiQueryACMIL, acmil_loss

SHARED = ((r"reduce", "dimreduction.fc1"), (r"^heads\.(\d)\.1", r"classifier.\1.fc"), (r"^head\.1", "Slide_classifier.fc"))


def compared(g: Vectors, made: Branches, parameters: dict[str, torch.nn.Parameter], shape: tuple[int, ...]) -> None:
    x = g.leaf("x")
    out = made(x, draw=g("draw").reshape(shape) if g["masked"] else None)
    loss = acmil_loss(out, g("labels"))
    for name, found in (("out", loss), ("branches", out.branches), ("bag", out.bag), ("scores", out.scores)):
        g.same(found, name)
    g.gradients(g.weigh(loss), {"x": x} | parameters)


@case("g0", "g1", "g2")
def gated(g: Vectors) -> None:
    made = ACMIL(5, 3, 8, 4, 3, g["masked"], g["share"]).to(g.dtype)
    names = (
        ("score.v", "attention.attention_V.0"),
        ("score.u", "attention.attention_U.0"),
        ("score.weights", "attention.attention_weights"),
    )
    compared(g, made, g.fill(made, *SHARED, *names), (1, 3, -1))


@case("m0", "m1")
def queries(g: Vectors) -> None:
    made = MultiQueryACMIL(5, 3, 8, 8, 3, g["masked"], g["share"], attention_dropout=0.0).to(g.dtype)
    names = [
        ("queries", "q"),
        (r"^([qk])\.(\d)", r"sub_attention.\2.\1_proj"),
        (r"read\.(\d)", r"sub_attention.\1"),
        ("whole", "bag_attention"),
    ]
    names += [(r"\.v\.", ".v_proj."), (r"\.out\.", ".out_proj."), (r"\.norm\.", ".layer_norm.")]
    if g["masked"]:
        g.arrays[f"draw_{g.config}"] = g("draw").transpose(0, 1).numpy()
    compared(g, made, g.fill(made, *SHARED, *names), (1, 8, 3, -1))
