"""Gaussian adaptive attention along an axis, with padding, and layers one after another."""

from __future__ import annotations

from golden.vectors import Vectors, case

import regard


def layer(
    g: Vectors, prefix: str, axis: int, heads: int, gaussians: int, padding: float | None = None
) -> regard.nn.GaussianAdaptiveAttention:
    made = regard.nn.GaussianAdaptiveAttention(axis, heads, gaussians, padding_value=padding).to(g.dtype)
    for h in range(heads):
        g.put(made.delta[h], f"{prefix}attention_heads.{h}.mean_offsets")
        g.put(made.c[h], f"{prefix}attention_heads.{h}.c")
    return made


@case("c0", "c1", "c2", "c3")
def attention(g: Vectors) -> None:
    made, x = layer(g, "", g["axis"], g["heads"], g["G"], g.get("padding_value")), g.leaf("x")
    y, weights = made(x, return_weights=True)
    g.same(y, "out")
    g.same(weights, "weights")
    g.gradients(g.weigh(y), {"x": x})
    g.weigh(y).backward()
    for h in range(g["heads"]):
        g.same(made.delta.grad[h], f"grad_attention_heads.{h}.mean_offsets", g.grad)
        g.same(made.c.grad[h], f"grad_attention_heads.{h}.c", g.grad)


@case("c4")
def stack(g: Vectors) -> None:
    each = zip(g["axes"], g["heads"], g["G"], strict=True)
    layers = [layer(g, f"layers.{at}.", *options) for at, options in enumerate(each)]

    def forward(x):
        for one in layers:
            x = x + one(x)
        return x

    g.layer(forward)
