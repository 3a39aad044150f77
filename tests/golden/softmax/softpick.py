"""Softpick: the row map, causal attention with fewer queries than keys and grouped heads, decoding."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case, streamed

import regard
from regard.zoo.softmax.softpick import softpick_weights


@case("c0")
def rows(g: Vectors) -> None:
    x = g.leaf("x")
    y = softpick_weights(x)
    g.same(y, "y")
    g.gradients((y[:10] * g("w")).sum(), {"x": x}, 1.2e-7 if g.dtype == torch.float64 else None)


@case("c1", "c2", "c3")
def attention(g: Vectors) -> None:
    leaves = g.leaves("q", "k", "v")
    q, k, v = (x.transpose(1, 2) for x in leaves.values())
    out = regard.attend(q, k, v, "softpick", mask=regard.Causal()).transpose(1, 2)
    g.same(out, "out")
    g.gradients(g.weigh(out), leaves)
    want = g("A")
    g.same(regard.weights(q, k, "softpick", mask=regard.Causal())[: want.shape[0], : want.shape[1]], "A")


@case("c4", dtypes=[torch.float32])
def single_precision(g: Vectors) -> None:
    attention(g)


@case("c3")
def decoding(g: Vectors) -> None:
    q, k, v = (g(name).transpose(1, 2) for name in ("q", "k", "v"))
    out, _ = streamed(lambda q, k, v, state: regard.step(q, k, v, "softpick", state), q, k, v)
    g.same(out.transpose(1, 2), "out")


@case("c5", dtypes=[torch.float32])
def very_negative_rows(g: Vectors) -> None:
    x = g.leaf("x")
    y = softpick_weights(x)
    g.same(y, "y", 0.0)
    assert bool(torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all())
