"""Performer: FAVOR+ and generalized kernels, both directions and causal, with the projection given."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case, streamed

import regard


def projection(g: Vectors) -> torch.Tensor:
    return g("projection_matrix") if g.has("projection_matrix") else torch.eye(g["d"], dtype=g.dtype)


def random_features(g: Vectors) -> None:
    w, given = projection(g), {}
    mechanism, mask = regard.get("performer", features=g["m"], eps=g["eps"]), regard.Causal() if g["causal"] else None
    if g["causal"]:  # the released code takes the largest exponent of all keys, later ones too: here the caller says it
        given["key_shift"] = (g("k") * g["d"] ** -0.25 @ w.mT).amax((-1, -2))
    g.op(lambda q, k, v: regard.attend(q, k, v, mechanism, mask=mask, projection=w, **given))
    q, k, v = (g(name) for name in "qkv")
    if g["causal"]:
        g.same(streamed(lambda q, k, v, s: regard.step(q, k, v, mechanism, s, projection=w, **given), q, k, v)[0], "out")
    elif g.has("phi_q"):
        env = {"projection": w}
        for phi, want in zip(mechanism.feature(q, k, env, env), ("phi_q", "phi_k"), strict=True):
            g.same(phi, want)


@case("c0", "c1", "c6")
def softmax_kernel(g: Vectors) -> None:
    random_features(g)


@case("c5", float32=1e-3)
def large_inputs(g: Vectors) -> None:
    random_features(g)


@case("c2", "c3", "c4", "c7")
def relu_kernel(g: Vectors) -> None:
    w, mask = projection(g), regard.Causal() if g["causal"] else None
    mechanism = regard.get("performer", features=len(w), kernel="relu", eps=g["eps"], normalize=g["data_scale"] != 1)
    g.op(lambda q, k, v: regard.attend(q, k, v, mechanism, mask=mask, projection=w))
    if g["causal"]:
        out, _ = streamed(lambda q, k, v, s: regard.step(q, k, v, mechanism, s, projection=w), *(g(name) for name in "qkv"))
        g.same(out, "out")
