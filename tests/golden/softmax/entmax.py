"""alpha-entmax: the row map with gradients to z and alpha, attention with one alpha a head, the limit alpha = 1."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case, streamed

import regard
from regard.zoo.softmax.entmax import entmax_weights


@case("c0")
def rows(g: Vectors) -> None:
    for at, alpha in enumerate(g("alpha").tolist()):
        x = g.leaf("x")
        a = torch.full((x.shape[0], 1), alpha, dtype=g.dtype, requires_grad=True)
        y = entmax_weights(x, a)
        dx, da = torch.autograd.grad((y * g("w")).sum(), (x, a))
        for got, want, tolerance in ((y, "y", None), (dx, "grad_x", g.grad), (da[:, 0], "grad_alpha", max(g.grad, 1e-8))):
            g.same(got, g.exact(want)[at], tolerance, what=f"{want} at alpha = {alpha}")


@case("c0")
def exact_by_sorting(g: Vectors) -> None:
    g.same(entmax_weights(g("x")[:12], 1.5), "y_entmax15_c0")


@case("c0")
def as_attention(g: Vectors) -> None:
    x = g("x")
    seen, eye = torch.isfinite(x), torch.eye(x.shape[1], dtype=g.dtype)[None, None]
    for at, alpha in enumerate(g("alpha").tolist()):
        for mechanism, given in (
            (regard.get("entmax", alpha=alpha), {}),
            (regard.get("entmax"), {"alpha": torch.tensor([alpha], dtype=g.dtype)}),
        ):
            q = torch.where(seen, x, 0.0)[None, None].requires_grad_()
            out = regard.attend(q, eye, eye, mechanism, mask=seen, scale=1.0, **given)
            g.same(out[0, 0], g.exact("y")[at], what=f"y at alpha = {alpha}")
            g.same(
                torch.autograd.grad((out[0, 0] * g("w")).sum(), q)[0][0, 0],
                g.exact("grad_x")[at],
                g.grad,
                what=f"grad_x at alpha = {alpha}",
            )


@case("c1", "c2")
def heads(g: Vectors) -> None:
    leaves = g.leaves("q", "k", "v", "a")
    q, k, v, a = leaves.values()
    out = regard.attend(q, k, v, "entmax", mask=g("mask"), alpha=1 + torch.sigmoid(a))
    g.same(out, "out")
    g.gradients(g.weigh(out), leaves)
    weights = regard.weights(q, k, regard.get("entmax"), mask=g("mask"), alpha=1 + torch.sigmoid(a))
    g.same(weights[0, 0], "P_head0")


@case("c2")
def decoding(g: Vectors) -> None:
    alpha = 1 + torch.sigmoid(g("a"))
    out, _ = streamed(lambda q, k, v, state: regard.step(q, k, v, "entmax", state, alpha=alpha), *(g(name) for name in "qkv"))
    g.same(out, "out")


@case("c3", dtypes=[torch.float64])
def limit(g: Vectors) -> None:
    x = g("x")
    a = torch.ones(len(x), 1, dtype=g.dtype, requires_grad=True)
    y = entmax_weights(x, a)
    g.same(y, x.softmax(-1))
    g.same(
        torch.stack([torch.autograd.grad(y[:, j].sum(), a, retain_graph=True)[0][:, 0] for j in range(y.shape[1])], 1), "alpha1_dy_dalpha"
    )
