"""LLN attention: temperatures, both directions and causal, and its mixtures with softmax inside blocks."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case, streamed

import regard
from regard.zoo.linear.lln_attention import A, B, temperature


@case("c0", "c1", "c2", "c3", "c4", "c5")
def attention(g: Vectors) -> None:
    q, k, v = (g(name) for name in "qkv")
    sigma_q, sigma_k = q.std(), k.std()
    t = temperature(sigma_q, sigma_k, A, B)
    g.same(torch.stack((t / sigma_q, t / sigma_k)), "alpha_beta")
    mode = g["mode"]
    options = {"diagonal": {None: False, "average": True}.get(mode, "channels"), "block_size": g["block"]}
    blend = {}
    if options["diagonal"] == "channels":
        blend["blend"] = torch.stack((g("r"), g("p") if g.has("p") else 1 - g("r")))[:, 0, :, 0]
    given = {"sigma_q": sigma_q, "sigma_k": sigma_k, **blend}
    if not g["causal"]:
        g.op(lambda q, k, v: regard.attend(q, k, v, regard.get("lln-attention", **options), **blend))
        g.op(lambda q, k, v: regard.attend(q, k, v, regard.get("lln-attention", statistics="given", **options), **given))
        return
    # The released code takes the largest key of all, later ones too: here the caller says it.
    mechanism = regard.get("lln-attention", statistics="given", shift="given", **options)

    def largest(k: torch.Tensor) -> torch.Tensor:
        return (k * t / sigma_k).amax((-1, -2))

    g.op(lambda q, k, v: regard.attend(q, k, v, mechanism, mask=regard.Causal(), key_max=largest(k), **given))
    given["key_max"] = largest(k)
    g.same(streamed(lambda q, k, v, s: regard.step(q, k, v, mechanism, s, **given), q, k, v)[0], "out")
