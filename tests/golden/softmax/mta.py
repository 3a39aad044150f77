"""Multi-token attention: convolutions of logits and weights, head mixing, grouped heads, gates."""

from __future__ import annotations

from golden.vectors import Vectors, case, stepped

import regard
from regard.zoo.softmax.mta import MultiTokenAttention

OPTIONS = {
    "c0": {
        "heads": 4,
        "queries": 3,
        "keys": 5,
        "convolve": "pre",
        "pre_mix": 0,
        "post_mix": 0,
        "norm": False,
        "gate": False,
        "head_dim": 4,
    },
    "c1": {"heads": 4, "queries": 4, "keys": 7, "post_queries": 3, "post_keys": 5, "pre_mix": 4, "post_mix": 2, "depth": 3, "head_dim": 4},
    "c2": {
        "heads": 4,
        "queries": 2,
        "keys": 3,
        "convolve": "post",
        "pre_mix": 0,
        "post_mix": 4,
        "gate": "full",
        "kv_heads": 2,
        "head_dim": 4,
    },
    "c3": {"heads": 2, "queries": 6, "keys": 11, "pre_mix": 2, "post_mix": 2, "head_dim": 4},
    "c4": {
        "heads": 2,
        "queries": 2,
        "keys": 4,
        "side": "left",
        "convolve": "pre",
        "pre_mix": 0,
        "post_mix": 0,
        "norm": False,
        "gate": False,
    },
}


@case(*OPTIONS)
def layer(g: Vectors) -> None:
    made: MultiTokenAttention = regard.nn.MultiTokenAttention(g("x").shape[-1], **OPTIONS[g.config]).to(g.dtype)
    parts = {
        "q": "wq",
        "k": "wk",
        "v": "wv",
        "out": "wo",
        "pre": "mta_kernel",
        "post": "mta_kernel_after_sm",
        "norm": "subln",
        "gate": "gate",
    }
    parts |= {"pre_mix": "wpsm.weight", "post_mix": "wposm.weight"}
    watched = {}
    for ours, theirs in parts.items():
        for part in ("weight", "bias"):
            name = theirs if g.has(theirs) else f"{theirs}.{part}"
            parameter = getattr(getattr(made, ours), part, None)
            if parameter is not None and g.has(name) and (part == "weight" or not g.has(theirs)):
                g.put(parameter, g(name).reshape(parameter.shape))
                watched[name] = parameter
    if g.has("head_kernel"):  # stored as in x out
        g.put(made.post_mix.weight, g("head_kernel").transpose(-1, -2))
    g.layer(made, **watched)
    g.same(stepped(made, g("x"))[0], "out")


@case("c1", "c3")
def head_kernel(g: Vectors) -> None:
    layer_gradient = OPTIONS[g.config]
    made = regard.nn.MultiTokenAttention(g("x").shape[-1], **layer_gradient).to(g.dtype)
    names = {"q": "wq", "k": "wk", "v": "wv", "out": "wo", "norm": "subln", "gate": "gate"}
    g.load(made, names | {"pre.weight": "mta_kernel", "post.weight": "mta_kernel_after_sm", "pre_mix.weight": g("wpsm.weight")[None]})
    g.put(made.post_mix.weight, g("head_kernel").transpose(-1, -2))
    g.weigh(made(g("x"))).backward()
    g.same(made.post_mix.weight.grad.transpose(-1, -2), "grad_head_kernel", g.grad)
