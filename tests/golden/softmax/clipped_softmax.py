"""Clipped softmax on rows, its layer, and the kinds of gates; the stored outputs stand before the output projection."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

import regard


@case("c0")
def rows(g: Vectors) -> None:
    eye = torch.eye(32, dtype=g.dtype)[None, None]
    for at, (gamma, zeta) in enumerate(zip(g("gamma").tolist(), g("zeta").tolist(), strict=True)):
        q = g("z")[None, None].requires_grad_()
        y = regard.attend(q, eye, eye, regard.get("clipped-softmax", gamma=g.meta["hyper"]["c0"][at]["gamma"], zeta=zeta), scale=1.0)
        assert abs(gamma - g.meta["hyper"]["c0"][at]["gamma"]) < 1e-6
        g.same(y[0, 0], g.exact("y")[at])
        g.same(torch.autograd.grad((y[0, 0] * g("w")).sum(), q)[0][0, 0], g.exact("grad_z")[at], g.grad)


def layer(g: Vectors, **options: object) -> regard.nn.Attention:
    made = regard.nn.Attention(24, 3, regard.get("clipped-softmax", **options), causal=False, bias=True, context_len=15).to(g.dtype)
    g.load(
        made,
        {"q": "query", "k": "key", "v": "value", "out.weight": torch.eye(24, dtype=g.dtype), "out.bias": torch.zeros(24, dtype=g.dtype)},
    )
    return made


@case("c1")
def clipped(g: Vectors) -> None:
    made, mask = layer(g, alpha=4), g("mask")
    g.layer(lambda x: made(x, mask=mask))
    g.same(made(g("x"), mask=regard.Padding(), keep=mask[:, 0, 0]), "out")
    q, k, v, _ = made.heads_of(g("x"), g("x"), 0, None)
    g.same(regard.attend(q, k, v, "clipped-softmax", mask=mask).transpose(1, 2).flatten(-2), "out")
    g.same(regard.weights(q, k, regard.get("clipped-softmax", gamma=-4 / 15), mask=mask)[:, 0], "A_head0")


def gated(g: Vectors, made: regard.nn.Attention, watched: dict[str, torch.Tensor]) -> None:
    g.layer(lambda x: made(x, mask=g("mask")))
    out = made(g("x"), mask=g("mask"))
    found = torch.autograd.grad(g.weigh(out), list(watched.values()))
    for (name, parameter), grad in zip(watched.items(), found, strict=True):
        want = [g.exact(f"grad_{name.format(h)}") for h in range(3)] if "{}" in name else [g.exact(f"grad_{name}")]
        g.same(grad, torch.stack(want).reshape(parameter.shape), g.grad, what=name)


def stacked(g: Vectors, name: str) -> torch.Tensor:
    return torch.stack([g(name.format(h)) for h in range(3)])


@case("c2")
def linear_gate(g: Vectors) -> None:
    made = layer(g, gamma=0, out_gate="head", gate_init=0.25, gate_factor=4.0)
    gate = made.head_gate
    g.put(gate.weight, stacked(g, "alpha.{}.weight")[:, 0])
    g.put(gate.bias, stacked(g, "alpha.{}.bias")[:, 0])
    gated(g, made, {"alpha.{}.weight": gate.weight, "alpha.{}.bias": gate.bias})


@case("c3", "c4")
def gate_with_a_hidden_layer(g: Vectors) -> None:
    hidden = stacked(g, "alpha.{}.0.weight")
    made = layer(g, gamma=0, out_gate="head_mlp", gate_hidden=hidden.shape[1])
    gate = made.head_gate
    g.put(gate.hidden, hidden.transpose(1, 2))
    g.put(gate.hidden_bias, stacked(g, "alpha.{}.0.bias"))
    g.put(gate.weight, stacked(g, "alpha.{}.2.weight")[:, 0])
    g.put(gate.bias, stacked(g, "alpha.{}.2.bias")[:, 0])
    gated(g, made, {"alpha.{}.0.bias": gate.hidden_bias, "alpha.{}.2.weight": gate.weight, "alpha.{}.2.bias": gate.bias})


@case("c5")
def gate_of_all_heads(g: Vectors) -> None:
    made = layer(g, gamma=0, out_gate="heads")
    g.put(made.head_gate.weight, "alpha.weight")
    g.put(made.head_gate.bias, "alpha.bias")
    gated(g, made, {"alpha.weight": made.head_gate.weight, "alpha.bias": made.head_gate.bias})


@case("c6")
def constant_gate(g: Vectors) -> None:
    made = layer(g, gamma=0, out_gate="constant")
    g.put(made.head_gate.bias, g("alpha").flatten())
    gated(g, made, {"alpha": made.head_gate.bias})


@case("c7")
def gate_of_the_mean_token(g: Vectors) -> None:
    made = layer(g, gamma=0, out_gate="mean")
    g.put(made.head_gate.weight, stacked(g, "alpha.{}.weight")[:, 0])
    g.put(made.head_gate.bias, stacked(g, "alpha.{}.bias")[:, 0])
    gated(g, made, {"alpha.{}.weight": made.head_gate.weight, "alpha.{}.bias": made.head_gate.bias})
