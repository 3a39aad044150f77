"""SLAB: the vision layer, and the norm that turns from LayerNorm into BatchNorm."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

import regard
from regard.nn.images.grid import Dress


@case("c0", "c1", "c2")
def layer(g: Vectors) -> None:
    dress = Dress(local=g["kernel_size"], shared=True, key_position=True)
    made = regard.nn.GridAttention(g["dim"], g["heads"], tuple(g["window"]), "slab", dress=dress).to(g.dtype)
    g.load(made, {"qkv": "qkv", "out": "proj", "local": "dwc", "key_position": "positional_encoding"})
    g.layer(made)


@case("prepbn")
def norm(g: Vectors) -> None:
    made = regard.nn.PRepBN(g["dim"], steps=g["step"], start=g["r0"], warm_up=g["warm"]).to(g.dtype).eval()
    g.load(made, {"layer": "norm1", "rep.norm": "norm2.bn", "rep.eta": g("norm2.alpha").reshape(())})
    g.load(made, {f"rep.norm.{name}": f"norm2.bn.{name}" for name in ("running_mean", "running_var")})
    x = g.leaf("x_eval")
    out = made(x)
    g.same(out, "out_eval")
    g.same(torch.autograd.grad((out * g("probe_eval")).sum(), x)[0], "grad_x_eval", max(g.value, 2e-7))
    linear = torch.nn.Linear(6, 5, dtype=g.dtype)
    g.load(linear, {"weight": "linear_weight_fold", "bias": "linear_bias_fold"})
    fused = made.fuse(linear)
    for got, want in ((fused.weight, "folded_weight_fold"), (fused.bias, "folded_bias_fold"), (fused(x), "out_fold")):
        g.same(got, want)
    made.train()
    for x, want in zip(g("x_train_steps"), g.exact("out_train_steps"), strict=True):
        g.same(made(x), want)
    g.same(made.rep.norm.running_mean, "running_mean_after")
    g.same(made.rep.norm.running_var, "running_var_after")
