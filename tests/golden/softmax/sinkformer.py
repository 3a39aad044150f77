"""Sinkformer: normalisations one after another, transport plans, the layer, and padding both ways."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

import regard


def as_attention(scores: torch.Tensor, iterations: int, scale: float = 1.0) -> torch.Tensor:
    eye = torch.eye(scores.shape[-1], dtype=scores.dtype).expand(len(scores), 1, -1, -1)
    return regard.attend(scores[:, None], eye, eye, regard.get("sinkformer", iterations=iterations), scale=scale)[:, 0]


@case("c0")
def iterations(g: Vectors) -> None:
    for at, n in enumerate(g("n_iters").tolist()):
        scores = g.leaf("scores")
        out = as_attention(scores, n)
        g.same(out, g.exact("A")[at])
        g.same(torch.autograd.grad((out * g("w")).sum(), scores)[0], g.exact("grad_scores")[at], g.grad)


@case("c1")
def plans(g: Vectors) -> None:
    for at, n in enumerate(g("n_iters").tolist()):  # regard's rows and columns sum to one, a plan's entries
        g.same(as_attention(g("scores"), n) / g("scores").shape[1], g.exact("plan")[at])


@case("c2")
def temperatures(g: Vectors) -> None:
    for at, eps in enumerate(g("eps").tolist()):
        g.same(as_attention(g("scores_c0"), 5, 1 / eps), g.exact("A")[at])


@case("c3")
def layer(g: Vectors) -> None:
    made = regard.nn.Attention(24, 3, "sinkformer", causal=False, bias=True).to(g.dtype)
    for name, part in zip("qkv", g("to_qkv.weight").chunk(3), strict=True):
        g.put(getattr(made, name).weight, part)
        g.put(getattr(made, name).bias, torch.zeros(24, dtype=g.dtype))
    g.load(made, {"out": "to_out.0"})
    g.layer(made, **{"to_out.0.weight": made.out.weight, "to_out.0.bias": made.out.bias})
    g.same(made.weights(g("x"))[:1], "A")


@case("c4")
def hidden_keys(g: Vectors) -> None:
    """Padding() hides keys; padded queries still take their share of the columns."""
    for detached, tail in ((True, ""), (False, "_full")):
        leaves, mechanism = g.leaves("q", "k", "v"), regard.get("sinkformer", iterations=5, detach_columns=detached)
        out = regard.attend(*leaves.values(), mechanism, mask=regard.Padding(), keep=~g("pad"))
        g.same(out, "out")
        for name, want in (("q", f"grad_q{tail}"), ("k", f"grad_k{tail}"), ("v", "grad_v")):
            g.same(torch.autograd.grad(g.weigh(out), leaves[name], retain_graph=True)[0], want, g.grad)
    weights = regard.weights(g("q"), g("k"), regard.get("sinkformer", iterations=5), mask=regard.Padding(), keep=~g("pad"))
    g.same(weights, "A")


@case("c5")
def hidden_tokens(g: Vectors) -> None:
    keep = ~g("pad_c4")
    q, k, v = (g(f"{name}_c4") for name in "qkv")
    pairs = (keep[:, :, None] & keep[:, None])[:, None]
    out = regard.attend(q, k, v, regard.get("sinkformer", iterations=5), mask=pairs)
    g.same(out[1:, :, :11], "out")
    g.same(out[1:, :, 11:], torch.zeros_like(out[1:, :, 11:]), 0.0)
    g.same(regard.weights(q, k, regard.get("sinkformer", iterations=5), mask=pairs)[1:, :, :11, :11], "A")
