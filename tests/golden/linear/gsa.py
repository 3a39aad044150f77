"""Gated slot attention: the recurrence with first and last slots and grouped heads, ABC, and the layer."""

from __future__ import annotations

from golden.vectors import Vectors, case, stepped, streamed

import regard


@case("c0", "c1", "c2")
def operator(g: Vectors) -> None:
    share, mechanism = g["H"] // g["Hkv"], regard.get("gsa", scaled=g["scale"] != 1.0)
    starts = ["initial_k_state", "initial_v_state"] if g.has("initial_k_state") else []
    leaves = g.leaves("q", "k", "v", "s", "log_f", *starts)
    q, k, v, write, forget = (leaves[name].transpose(1, 2) for name in ("q", "k", "v", "s", "log_f"))
    start = (leaves["initial_k_state"].transpose(-1, -2), leaves["initial_v_state"]) if starts else None
    out, state = regard.attend(q, k, v, mechanism, log_forget=forget, write=write, state=start, return_state=True)
    last_k, last_v = state.k[:, ::share].transpose(-1, -2), state.v[:, ::share]
    g.same(out.transpose(1, 2), "out")
    g.same(last_k, "final_k_state")
    g.same(last_v, "final_v_state")
    g.gradients(g.weigh(out.transpose(1, 2)) + g.weigh(last_k, "probe_k_state") + g.weigh(last_v, "probe_v_state"), leaves)
    out, state = streamed(
        lambda q, k, v, w, f, s: regard.step(q, k, v, mechanism, s, log_forget=f, write=w), q, k, v, write, forget, state=start
    )
    g.same(out.transpose(1, 2), "out")
    g.same(state.k[:, ::share].transpose(-1, -2), "final_k_state")
    if start is None:
        g.same(regard.attend(q, k, v, mechanism, log_forget=forget, write=write).transpose(1, 2), "out")


@case("abc")
def without_gates(g: Vectors) -> None:
    mechanism = regard.get("gsa", gates="sum", scaled=True)
    g.op(lambda q, k, v, s: regard.attend(q, k, v, mechanism, write=s), q="q", k="k", v="v", s="s")
    out, _ = streamed(lambda q, k, v, w, s: regard.step(q, k, v, mechanism, s, write=w), *(g(name) for name in "qkvs"))
    g.same(out, "out")


@case("l0", "l1")
def layer(g: Vectors) -> None:
    mechanism = regard.get("gsa", slots=g["num_slots"], feature_map=g.get("feature_map", "silu"))
    made = regard.nn.Attention(16, g["num_heads"], mechanism, kv_heads=g.get("num_kv_heads")).to(g.dtype)
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj", "merge_norm": "g_norm"}
    g.load(made, names | ({"feature": "feature_map.layer"} if g.has("feature_map.layer.weight") else {}))
    g.load(made.inputs.projected["log_forget"], {"up": "f_proj"})
    g.layer(made, "hidden_states")
    g.same(stepped(made, g("hidden_states"))[0], "out")
