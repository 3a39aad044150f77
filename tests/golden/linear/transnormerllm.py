"""TransNormerLLM: the layer with and without positions and padding, a block, default slopes and angles."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case, stepped

import regard


def layer(g: Vectors, prefix: str = "") -> regard.nn.Attention:
    mechanism = regard.get("transnormerllm", layer=g["layer"], layers=g["n_layer"], positions=g["use_lrpe"])
    made = regard.nn.Attention(g["n_embd"], g["n_head"], mechanism).to(g.dtype)
    for ours, weight in zip((made.q, made.k, made.v, made.gate), g(f"{prefix}qkvu_proj.weight").chunk(4), strict=True):
        g.put(ours.weight, weight)
    g.load(made, {"out": f"{prefix}out_proj"})
    if g["use_lrpe"]:
        theta = g(f"{prefix}lrpe.theta")[:, 0]
        if not g.get("random_theta"):
            g.same(made.inputs.learned["theta"], theta, 1e-6)
        g.put(made.inputs.learned["theta"], theta)
    g.same(-made.inputs.fixed_log_decay, "slope_rate", 1e-6)
    g.put(made.inputs.fixed_log_decay, -g("slope_rate"))
    return made


@case("c0", "c1", "c2")
def layers(g: Vectors) -> None:
    made, x = layer(g), g("x")
    if g.get("pad"):
        keep = g("attn_padding_mask").bool()
        g.layer(lambda x: made(x, mask=regard.Padding(), keep=keep))
        outs, state = [], None
        with torch.no_grad():
            for t in range(x.shape[1]):
                y, state = made.step(x[:, t : t + 1], state, mask=regard.Padding(), keep=keep[:, : t + 1])
                outs.append(y)
        g.same(torch.cat(outs, 1), "out")
        return
    g.layer(made)
    for pieces in (None, [13] + [1] * (x.shape[1] - 13)):
        y, state = stepped(made, x, pieces)
        g.same(y, "out")
        if g.has("final_state"):
            g.same(state.inner.s, "final_state")


@case("b0")
def block(g: Vectors) -> None:
    made = regard.nn.Block(g["n_embd"], layer(g, "token_mixer."), g("channel_mixer.l1.weight").shape[0], norm="srms", mlp="sglu").to(
        g.dtype
    )
    g.load(made, {"mlp.gate": "channel_mixer.l1", "mlp.up": "channel_mixer.l2", "mlp.down": "channel_mixer.l3"})
    g.layer(made)
    g.same(stepped(made, g("x"))[0], "out")
