"""InLine attention: the core, and the vision layer with its local residual and feature maps."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

import regard


@case("f0")
def core(g: Vectors) -> None:
    g.op(lambda q, k, v: regard.attend(q, k, v, "inline-attention"))


@case("c0", "c1", "c2", "c3", "c4")
def layer(g: Vectors) -> None:
    biased, shape = g["kind"] != "pvt", (g["H"], g["W"])
    made = regard.nn.GridAttention(
        g["dim"], g["heads"], shape, "inline-attention", cls=bool(g.get("cls")), qkv_bias=biased, feature=g["phi"]
    ).to(g.dtype)
    weight = g("qkv.weight") if biased else torch.cat((g("q.weight"), g("kv.weight")))
    g.load(made, {"qkv.weight": weight, "out": "proj", "dynamic.first": "residual.0", "dynamic.last": "residual.2"})
    if biased:
        g.put(made.qkv.bias, "qkv.bias")
    g.layer(made)
