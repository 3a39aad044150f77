"""SOFT: the whole module with each way to invert, and Newton's inverse alone. No bias of the convolutions, one kernel a head."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

import regard
from regard.engine.composed import NewtonInverse

MODES = {"newton": "newton", "norm": "released", "exact": "exact"}


@case("c0", "c1", "c2", "c3", "c4", float32=1e-4)
def module(g: Vectors) -> None:
    dim, heads, conv = g["dim"], g["heads"], g["conv_size"]
    made = regard.nn.SoftmaxFreeAttention(
        dim, heads, (g["H"], g["W"]), g["ratio"], iterations=g["max_iter"] or 20, mode=MODES[g["mode"]], conv=conv, conv_bias=False
    ).to(g.dtype)
    g.load(made, {"q": "W_q", "v": "W_v", "out": "ff", "landmark": "attn.Qlandmark_op", "norm": "attn.Qnorm_act.0"})
    if conv:
        g.put(made.conv.weight, g("attn.conv.weight").repeat_interleave(dim // heads, 0))
    g.layer(made)


@case("inv", float32=1e-4)
def inverse(g: Vectors) -> None:
    a = g("A")[None, None].requires_grad_()
    y = NewtonInverse.apply(a, 0.01, 1.8, 20)
    g.same(y[0, 0], "pinv")
    (grad,) = torch.autograd.grad((y[0, 0] * g("probe")).sum(), a)
    g.same(grad[0, 0], "grad_A", max(g.value, 2e-7))
