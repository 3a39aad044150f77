"""Galerkin, Fourier, linear and softmax attention of three inputs with coordinates, and the encoder layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from golden.vectors import Vectors, case

import regard


def layer(g: Vectors, prefix: str, heads: int, normed: bool) -> regard.nn.OperatorAttention:
    dim = g["d_model"]
    made = regard.nn.OperatorAttention(dim, heads, g["kind"], g["pos_dim"], norm=normed).to(g.dtype)
    for at, ours in enumerate("qkv"):
        g.load(made, {ours: f"{prefix}linears.{at}"})
    for name, norm in made.norms.items():
        for part in ("weight", "bias"):
            each = [g(f"{prefix}norm_{name.upper()}.{h}.{part}") for h in range(heads)]
            g.put(getattr(norm, part), torch.stack(each)[:, None])
    if g.has(f"{prefix}fc.weight"):
        g.load(made, {"out": f"{prefix}fc"})
    else:  # without coordinates the official layer has no projection
        g.load(made, {"out.weight": torch.eye(dim, dtype=g.dtype), "out.bias": torch.zeros(dim, dtype=g.dtype)})
    return made


@case("c0", "c1", "c2", "c3", "c4", "c5")
def attention(g: Vectors) -> None:
    made, leaves = layer(g, "", g["H"], g["norm"]), g.leaves("query", "key", "value")
    place = g("pos") if g.has("pos") else torch.zeros(*g("query").shape[:2], 0, dtype=g.dtype)
    out = made(leaves["query"], place, key=leaves["key"], value=leaves["value"])
    g.same(out, "out")
    g.gradients(g.weigh(out), leaves)


@case("l0", "l1")
def encoder(g: Vectors) -> None:
    normed, dim = bool(g.get("attn_norm")), g["d_model"]
    made = layer(g, "attn.", g["n_head"], normed)

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = x + made(x, g("pos"))
        x = x if normed else F.layer_norm(x, (dim,), g("layer_norm1.weight"), g("layer_norm1.bias"))
        x = x + F.linear(F.linear(x, g("ff.lr1.weight"), g("ff.lr1.bias")).relu(), g("ff.lr2.weight"), g("ff.lr2.bias"))
        return x if normed else F.layer_norm(x, (dim,), g("layer_norm2.weight"), g("layer_norm2.bias"))

    g.layer(forward)
