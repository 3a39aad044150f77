"""Mega: the averages in both directions and truncated, and the layer by kind of weights, positions, chunks and padding. Time-first."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case, stepped

import regard
from regard.nn import MegaLayer, MultiHeadEMA


def load_averages(g: Vectors, made: MultiHeadEMA, prefix: str = "") -> None:
    for name in ("delta", "alpha", "beta", "gamma", "omega"):
        parameter = getattr(made, name)
        g.put(parameter, g(f"{prefix}{name}").reshape(parameter.shape))


@case("e0", "e1", "e2")
def averages(g: Vectors) -> None:
    made = MultiHeadEMA(g["D"], g["ndim"], g["bidirectional"], truncation=g["truncation"]).to(g.dtype)
    load_averages(g, made)
    parameters = {name: getattr(made, name) for name in ("delta", "alpha", "beta", "gamma", "omega")}
    g.layer(lambda x: made(x.transpose(0, 1)).transpose(0, 1), **parameters)
    if g.has("state_after15"):
        x = g("x").transpose(0, 1)
        with torch.no_grad():
            y, state = made.step(x[:, :15])
            g.same(state, "state_after15")
            z, _ = made.step(x[:, 15:], state)
        g.same(torch.cat((y, z), 1).transpose(0, 1), "out")


@case("l0", "l1", "l2", "l3", "l4", "l5", "l6")
def layer(g: Vectors) -> None:
    chunk = None if g["chunk_size"] < 0 else g["chunk_size"]
    made = MegaLayer(
        g["embed_dim"], g["zdim"], g["hdim"], g["ndim"], chunk, g["attn"], g["causal"], chunk or g["max_positions"],
        positions=g["rel_pos_bias"],
    ).to(g.dtype)  # fmt: skip
    g.load(made, {"norm": "norm.norm", "v": "v_proj", "m": "mx_proj", "h": "h_proj", "kappa": "gamma", "mu": "beta"})
    load_averages(g, made.ema, "move.")
    if g["rel_pos_bias"] == "simple":  # stored by j - i
        g.put(made.offsets, g("rel_pos_bias.rel_pos_bias").flip(0))
    else:
        g.load(made, {"alpha": g("rel_pos_bias.alpha")[0], "beta": g("rel_pos_bias.beta")[0]})
    keep = ~g("padding_mask").bool() if g.has("padding_mask") else None
    x = g.leaf("x")
    out = made(x.transpose(0, 1), keep).transpose(0, 1)
    real = torch.ones_like(out) if keep is None else keep.T[..., None].to(out)  # outputs at padding are anyone's
    g.same(out * real, g.exact("out") * real)
    g.gradients(g.weigh(out), {"x": x})
    if g["causal"]:
        length = len(x)
        for pieces in (None, [11, 1, length - 12]):
            g.same(stepped(made, x.detach().transpose(0, 1), pieces)[0].transpose(0, 1), "out")


@case("l0", dtypes=[torch.float64])
def defaults(g: Vectors) -> None:
    assert isinstance(regard.nn.MegaLayer(8).norm, torch.nn.LayerNorm)
