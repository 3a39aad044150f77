"""Transformer-VQ: the layer with recent sets longer and shorter than a block, a window alone, the commitment and the codebook's averages.
The input norm stands before the layer."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case, stepped

import regard
from regard.nn.codes import quantise


def layer(g: Vectors) -> regard.nn.VQAttention:
    h, dk, dv = g["H"], g["dk"], g["dv"]
    made = regard.nn.VQAttention(g["D"], h, g["S"], g["L"], key_dim=dk, value_dim=h * dv, memory=g["M"], aggregate=g["agg"]).to(g.dtype)
    k, v, gate = g("kvg_proj.kernel").T.split([h * dk, h * dv, h * dv])
    g.load(made, {"k.weight": k, "v.weight": v, "gate.weight": gate} | {f"{x}.weight": g(f"{x}_proj.kernel").T for x in "qr"})
    g.load(made, {"out.weight": g("res_proj.kernel").T, "u": g("u").view(h, 1, dk), "w": g("v").view(h, 1, dk)})
    codebook(g, made.codebook)
    return made.eval()


def codebook(g: Vectors, book: regard.nn.Codebook) -> None:
    sums, counts = g("quantizer.c_sum"), g("quantizer.c_count")
    g.load(book, {"sums": sums, "counts": counts, "codes": sums / counts.clamp_min(0.01)[..., None]})


def norm(g: Vectors, x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * g("input_ln.g") + g("input_ln.b")


@case("c0", "c1", "c2", "c3")
def attention(g: Vectors) -> None:
    made, x = layer(g), g.leaf("x")
    g.same(quantise(made.heads_of(norm(g, x))[1], made.codebook.codes)[1], "shortcodes", 0.0)
    g.layer(lambda x: made(norm(g, x)))
    y, state = stepped(made, norm(g, g("x")))
    g.same(y, "out")
    g.same(stepped(made, norm(g, g("x")), [5, 1, x.shape[1] - 6])[0], "out")
    if g.has("agg_lower"):  # what a next block would fold into the codes
        old = slice(0, state.k.shape[2] - g["M"])
        kind = torch.nn.functional.one_hot(state.which[..., old], g["S"]).to(g.dtype)
        count, total = state.count + kind.sum(-2), state.total + kind.mT @ state.v[:, :, old]
        g.same(count, "agg_lower")
        g.same(total / count.clamp_min(1)[..., None], "agg_mean")
        g.same(state.k[:, :, -g["M"] :], "xlcache_k_hat")


@case("c0", "c1", "c2")
def commitment(g: Vectors) -> None:
    made, x = layer(g), g.leaf("x")
    made(norm(g, x))
    blocks = g("l_commit")  # one a block; the layer's is their mean
    g.same(made.commitment, blocks.mean())
    g.same(torch.autograd.grad(made.commitment * len(blocks), x)[0], "grad_commit_x", max(g.value, 2e-7))


@case("ema")
def averages(g: Vectors) -> None:
    book = regard.nn.Codebook(*g("c_sum_target").shape).to(g.dtype)
    g.load(book, {"sums": "quantizer.c_sum_c0", "counts": "quantizer.c_count_c0"})
    book.codes = book.sums / book.counts.clamp_min(0.01)[..., None]
    _, which = quantise(g("vecs"), book.codes)
    g.same(which, "shortcodes", 0.0)
    book.update(g("vecs"), which)
    g.same(book.sums, "c_sum_target")
    g.same(book.counts, "c_count_target")
