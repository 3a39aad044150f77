"""Standard, Optimised, Efficient and Super attention, on one input and on three."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

import regard

KINDS = {"SDPA": "standard", "Optimised": "optimised", "Efficient": "efficient", "Super": "super"}


def layer(g: Vectors) -> regard.nn.FrugalAttention:
    name = g.config.removesuffix("_cross")
    made = regard.nn.FrugalAttention(12, 3, KINDS[name], length=17, bias=True, mix_bias=name == "Super").to(g.dtype)
    for part in "qkv":
        if getattr(made, part) is not None:
            for kind in ("weight", "bias"):
                g.put(getattr(getattr(made, part), kind), torch.cat([g(f"head{h}.W_{part}.{kind}_{name}") for h in range(3)]))
    g.load(made, {f"out.{kind}": f"W_o.{kind}_{name}" for kind in ("weight", "bias")})
    if name == "Super":
        g.put(made.mix, "W_a.weight_Super")
        g.put(made.mix_bias, "W_a.bias_Super")
    return made


@case(*KINDS)
def self_attention(g: Vectors) -> None:
    made, x = layer(g), g.leaf("xq")
    out = made(x)
    g.same(out, "out")
    g.gradients(g.weigh(out), {"xq": x})


@case(*[f"{name}_cross" for name in KINDS])
def cross_attention(g: Vectors) -> None:
    made, leaves = layer(g), g.leaves("xq", "xk", "xv")
    out = made(leaves["xq"], context=leaves["xk"], value=leaves["xv"])
    g.same(out, "out")
    g.gradients(g.weigh(out), leaves)
