"""DeltaNet: the delta rule with first and last states, and the layer with its options."""

from __future__ import annotations

from golden.vectors import Vectors, case, refuses, stepped, streamed

import regard


@case("c0", "c1", "c3")
def operator(g: Vectors) -> None:
    leaves = g.leaves("q", "k", "v", "beta", *(["initial_state"] if g.has("initial_state") else []))
    q, k, v, beta = (leaves[name] for name in ("q", "k", "v", "beta"))
    start = leaves.get("initial_state")
    out, state = regard.attend(q, k, v, "deltanet", beta=beta, state=start, return_state=True)
    g.same(out, "out")
    g.same(state.s, "final_state")
    g.gradients(g.weigh(out) + g.weigh(state.s, "probe_state"), leaves)
    for executor in (None, "parallel"):
        g.same(regard.attend(q, k, v, "deltanet", beta=beta, executor=executor), "out" if start is None else "out_zero_state")
    out, state = streamed(lambda q, k, v, b, s: regard.step(q, k, v, "deltanet", s, beta=b), q, k, v, beta, state=start)
    g.same(out, "out")
    g.same(state.s, "final_state")


@refuses("c2", why="a write strength for each value channel makes every channel a recurrence of its own: give each a head")
def strength_of_a_channel(g: Vectors) -> None:
    regard.attend(g("q"), g("k"), g("v"), "deltanet", beta=g("beta"), state=g("initial_state"))


@case("c2")
def a_head_of_each_channel(g: Vectors) -> None:
    leaves = g.leaves("q", "k", "v", "beta", "initial_state")
    wide = leaves["v"].shape[-1]
    q, k = (leaves[name].repeat_interleave(wide, 1) for name in "qk")
    v, beta, start = (leaves[name].transpose(-1, -2).flatten(1, 2) for name in ("v", "beta", "initial_state"))
    out, state = regard.attend(q, k, v[..., None], "deltanet", beta=beta, state=start[..., None], return_state=True)
    out, last = (x[..., 0].unflatten(1, (-1, wide)).transpose(-1, -2) for x in (out, state.s))
    g.same(out, "out")
    g.same(last, "final_state")
    g.gradients(g.weigh(out) + g.weigh(last, "probe_state"), leaves)


@case("l0", "l1", "l2")
def layer(g: Vectors) -> None:
    options = {
        "l0": {},
        "l1": {"negative_eigenvalues": True, "conv_bias": True, "out_gate": "silu", "key_dim": 8},
        "l2": {"short_conv": 0, "activation": "elu+1", "qk_norm": "sum"},
    }[g.config]
    options |= {"negative_eigenvalues": bool(g.get("allow_neg_eigval"))}
    made = regard.nn.Attention(16, 2, regard.get("deltanet", **options), head_dim=16 if g.config == "l1" else None).to(g.dtype)
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj", "out_norm": "o_norm"}
    names |= {f"convs.{at}": f"{name}_conv1d" for at, name in enumerate("qkv") if len(made.convs)}
    g.load(made, names | ({"gate": "g_proj"} if made.gate is not None else {}))
    g.load(made.inputs.projected["beta"], {"up": "b_proj"})
    g.layer(made, "hidden_states")
    g.same(stepped(made, g("hidden_states"))[0], "out")
