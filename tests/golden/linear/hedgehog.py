"""Hedgehog: LoLCATs' learned maps, their weights, and the loss that distils them."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case, streamed

import regard
from regard.adapt.linearise import distillation_loss

FORMS = {"softmax": "softmax", "exp": "exp_shifted", "softmax_half": "half"}


def given(g: Vectors, **leaves: torch.Tensor) -> dict[str, torch.Tensor]:
    """Maps as (H, F, D) and shifts as (H,) from the stored (H, D, F) and (1, H, 1, 1)."""
    return {name: x.transpose(-1, -2) if name.endswith("map") else x.flatten() for name, x in leaves.items()}


def arrays(g: Vectors) -> dict[str, str]:
    found = {}
    for side, letter in (("query", "q"), ("key", "k")):
        found[f"{side}_map"] = f"feature_map_{letter}.mlp.layer"
        if g["bias"]:
            found[f"{side}_shift"] = f"feature_map_{letter}.mlp.bias"
    return found


def attention(g: Vectors) -> None:
    mechanism, mask, names = regard.get("hedgehog", form=FORMS[g["kind"]]), regard.Causal() if g["causal"] else None, arrays(g)
    g.op(lambda q, k, v, **kw: regard.attend(q, k, v, mechanism, mask=mask, **given(g, **kw)), q="q", k="k", v="v", **names)
    q, k, v = (g(name) for name in "qkv")
    fixed = given(g, **{name: g(array) for name, array in names.items()})
    if g["causal"]:
        g.same(streamed(lambda q, k, v, s: regard.step(q, k, v, mechanism, s, **fixed), q, k, v)[0], "out")
    if g.has("weights"):
        g.same(regard.weights(q, k, mechanism, mask=mask, **fixed), "weights", max(g.value, 2e-7))
    shifts = {f"{side}_shift": torch.zeros(g["H"], dtype=g.dtype) for side in ("query", "key")} | fixed
    g.same(mechanism.feature(q, k, shifts, shifts)[0], "phi_q")


@case("c0", "c1", "c2", "c3")
def forms(g: Vectors) -> None:
    attention(g)


@case("c4", float32=1e-3)
def peaked(g: Vectors) -> None:
    attention(g)


@case("c0")
def distillation(g: Vectors) -> None:
    leaves = {array: g.leaf(array) for array in arrays(g).values()}
    inputs = given(g, **{name: leaves[array] for name, array in arrays(g).items()})
    student = regard.weights(g("q"), g("k"), regard.get("hedgehog"), mask=regard.Causal(), **inputs)
    loss = distillation_loss(student, regard.weights(g("q"), g("k"), "softmax", mask=regard.Causal()))
    g.same(loss.reshape(1), "distill_loss")
    loss.backward()
    for array, leaf in leaves.items():
        if g.has(f"grad_distill_{array}"):
            g.same(leaf.grad, f"grad_distill_{array}", max(g.value, 2e-7))
