"""Agent attention: the vision modules, with a smaller grid of keys, and AgentSD."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from golden.vectors import Vectors, case

import regard
from regard.zoo.linear.agent_attention import agent_attention


@case("c0", "c1", "c2", "c3")
def module(g: Vectors) -> None:
    ratio, biased = g.get("sr_ratio") or 1, g.has("qkv.bias")
    made = regard.nn.AgentAttention(
        g["dim"], g["heads"], (g["H"], g["W"]), g["agent_num"], cls=bool(g.get("cls")), sr_ratio=ratio, qkv_bias=biased
    ).to(g.dtype)
    weight = g("qkv.weight") if g.has("qkv.weight") else torch.cat((g("q.weight"), g("kv.weight")))
    names = {"qkv.weight": weight, "out": "proj", "conv": "dwc"} | ({"qkv.bias": "qkv.bias"} if biased else {})
    names |= {"gather_grid": "an_bias", "gather_row": g("ah_bias")[0], "gather_column": g("aw_bias")[0], "spread_grid": "na_bias"}
    names |= {"spread_row": g("ha_bias")[0].permute(0, 3, 1, 2), "spread_column": g("wa_bias")[0].permute(0, 3, 1, 2)}
    if made.cls:
        names |= {"gather_cls": g("ac_bias")[0], "spread_cls": g("ca_bias")[0].transpose(-1, -2)}
    g.load(made, names | ({"reduce.conv": "sr", "reduce.norm": "norm"} if ratio > 1 else {}))
    g.layer(made)


@case("s0", "s1", "s2")
def diffusion(g: Vectors) -> None:
    """AgentSD falls back to softmax where agents would not save work; here that is the caller's choice."""
    leaves = g.leaves("x", "agent")

    def heads(y: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(y, g(f"{name}.weight")).unflatten(-1, (g["heads"], -1)).transpose(1, 2)

    q, k, v = (heads(leaves["x"], name) for name in ("to_q", "to_k", "to_v"))
    if g["falls_back_to_softmax"]:
        o = regard.attend(q, k, v)
    else:
        o = agent_attention(q, heads(leaves["agent"], "to_q"), k, v, spread_power=g["k_scale2"], shortcut=g["k_shortcut"])
    out = F.linear(o.transpose(1, 2).flatten(-2), g("to_out.weight"), g("to_out.bias"))
    g.same(out, "out")
    g.gradients(g.weigh(out), leaves)
