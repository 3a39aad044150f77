"""Based: the Taylor layer and its state, the functional form, feature maps, the gated convolution."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case, stepped, streamed

import regard
from regard.algebra import taylor
from regard.algebra.feature_map import taylor_packed
from regard.nn import GatedConv


@case("c0", "c1", "c2")
def layer(g: Vectors) -> None:
    x = g("hidden_states")
    for packed in (False, True):
        mechanism = regard.get("based", feature_dim=g["feature_dim"], packed=packed)
        made = regard.nn.Attention(g["d_model"], g["num_heads"], mechanism, causal=g["causal"]).to(g.dtype)
        g.load(made, {"q": "proj_q", "k": "proj_k", "v": "proj_v", "out": "out_proj" if g.config == "c0" else "proj_o"})
        g.layer(made, "hidden_states")
        if g["causal"]:
            g.same(stepped(made, x)[0], "out")
            y, state = stepped(made, x[:, :20], [13] + [1] * 7)
            g.same(y, g.exact("out")[:, :20])
        if g.config == "c0" and not packed:
            s = state.inner.s  # (B, H, F, D + 1): the last column is the mass
            g.same(s[..., :-1].transpose(-1, -2)[:, :, None], "kv_state_after20")
            g.same(s[..., -1][:, :, None, None], "k_state_after20")


@case("c3", "c4")
def functional(g: Vectors) -> None:
    mechanism = regard.get("based", eps=g["eps"], divide="add" if g.config == "c3" else "none")
    g.op(lambda q, k, v: regard.attend(q, k, v, mechanism, mask=regard.Causal()))
    out, _ = streamed(lambda q, k, v, s: regard.step(q, k, v, mechanism, s), *(g(name) for name in "qkv"))
    g.same(out, "out")


@case("phi")
def maps(g: Vectors) -> None:
    g.same(taylor(g("x")), "phi_full")
    ours, theirs = taylor_packed(g("x")), g("phi_packed")  # the triangles are in another order: products are compared
    g.same(ours @ ours.mT, theirs @ theirs.mT)


@case("conv")
def convolution(g: Vectors) -> None:
    made = GatedConv(8, 3, bias=True, conv_bias=g.has("conv.conv.bias")).to(g.dtype)
    weight, bias = g("in_proj.weight"), g("in_proj.bias")
    for side, part in (("left", slice(0, 8)), ("right", slice(8, 16))):
        g.load(made, {f"{side}.weight": weight[part], f"{side}.bias": bias[part]})
    g.load(made, {"conv": "conv.conv", "out": "out_proj"})
    g.layer(made, "u")
    g.same(stepped(made, g("u"))[0], "out")
    assert not any(torch.equal(x, torch.zeros_like(x)) for x in (made.left.bias, made.out.bias))
