"""LightNet: the recurrence on logits, and the layer with padding and short convolutions."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case, stepped, streamed

import regard


def recurrence(g: Vectors) -> None:
    leaves = g.leaves("q", "k_logits", "v")
    q, k, v = (x.transpose(1, 2) for x in leaves.values())
    out = regard.attend(q, k, v, "lightnet", mask=regard.Causal()).transpose(1, 2)
    g.same(out, "out")
    g.gradients(g.weigh(out), leaves)
    out, state = streamed(lambda q, k, v, s: regard.step(q, k, v, "lightnet", s), q, k, v)
    g.same(out.transpose(1, 2), "out")
    g.same(state.s, "final_state")
    g.same(regard.attend(q, k, v, "lightnet").transpose(1, 2), "out_bidirectional")


@case("f0")
def operator(g: Vectors) -> None:
    recurrence(g)


@case("f1", float32=1e-4)
def large_logits(g: Vectors) -> None:
    recurrence(g)


def layer(g: Vectors) -> regard.nn.Attention:
    conv = 4 if g.get("use_short_conv") else 0
    mechanism = regard.get("lightnet", gate_rank=g["gate_low_rank_dim"], key_dim=g["expand_ratio"], short_conv=conv)
    made = regard.nn.Attention(16, g["num_heads"], mechanism).to(g.dtype)
    names = {
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "out": "o_proj",
        "gate.0": "g_proj.0",
        "gate.1": "g_proj.1",
        "merge_norm": "g_norm",
    }
    g.load(made, names | {f"convs.{at}": f"{name}_conv1d" for at, name in enumerate("qkv") if conv})
    return made


@case("l0", "l2")
def layers(g: Vectors) -> None:
    made = layer(g)
    g.layer(made, "hidden_states")
    g.same(stepped(made, g("hidden_states"))[0], "out")


@case("l1")
def left_padding(g: Vectors) -> None:
    """Outputs at padding are left out; the official gradient is NaN there, and none is stored."""
    made, x = layer(g), g.leaf("hidden_states")
    out = made(x, mask=regard.Padding(), keep=g("attention_mask").bool())
    real = g("probe").abs().sum(-1, keepdim=True) > 0
    g.same(out * real, g.exact("out") * real)
    assert bool(torch.isfinite(torch.autograd.grad(g.weigh(out), x)[0]).all())
