"""Gated linear attention: the recurrence with first and last states, and the layer with grouped heads and clamped gates."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case, stepped, streamed

import regard


def recurrence(g: Vectors) -> None:
    leaves = g.leaves("q", "k", "v", "log_alpha", *(["initial_state"] if g.has("initial_state") else []))
    q, k, v, decay = (leaves[name].transpose(1, 2) for name in ("q", "k", "v", "log_alpha"))
    start = leaves.get("initial_state")
    out, state = regard.attend(q, k, v, "gla", log_decay=decay, state=start, return_state=True)
    g.same(out.transpose(1, 2), "out")
    g.same(state.s, "final_state")
    g.gradients(g.weigh(out.transpose(1, 2)) + g.weigh(state.s, "probe_state"), leaves)
    if start is None:
        for executor in (None, "parallel"):
            g.same(regard.attend(q, k, v, "gla", log_decay=decay, executor=executor).transpose(1, 2), "out")
    out, state = streamed(lambda q, k, v, a, s: regard.step(q, k, v, "gla", s, log_decay=a), q, k, v, decay, state=start)
    g.same(out.transpose(1, 2), "out")
    g.same(state.s, "final_state")


@case("c0", "c2", "c3")
def operator(g: Vectors) -> None:
    recurrence(g)


@case("c1", float32=1e-4)
def strong_decay(g: Vectors) -> None:
    recurrence(g)


@case("l0", "l1")
def layer(g: Vectors) -> None:
    mechanism = regard.get("gla", gate_rank=g["gate_low_rank_dim"], key_dim=g["expand_k"], clamp_min=g.get("clamp_min"))
    made = regard.nn.Attention(32, g["num_heads"], mechanism, kv_heads=g.get("num_kv_heads")).to(g.dtype)
    g.load(made, {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj", "gate": "g_proj", "out_norm": "g_norm_swish_gate"})
    g.load(made.inputs.projected["log_decay"], {"down": "gk_proj.0", "up": "gk_proj.1"})
    g.layer(made, "hidden_states")
    g.same(stepped(made, g("hidden_states"))[0], "out")


@case("l0", dtypes=[torch.float64])
def defaults(g: Vectors) -> None:
    assert regard.nn.Attention(32, 2, "gla").out_norm.eps == g["norm_eps"]
