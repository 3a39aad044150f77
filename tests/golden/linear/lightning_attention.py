"""Lightning Attention: the operator, default slopes, and the example module's layer."""

from __future__ import annotations

import torch
from golden.linear.lightning_attention_2 import recurrence
from golden.vectors import Vectors, case, stepped

import regard
from regard.algebra import Sizes


@case("c0", "c1", "c2")
def operator(g: Vectors) -> None:
    recurrence(g, "lightning-attention")


@case("c0", dtypes=[torch.float64])
def slopes(g: Vectors) -> None:
    spec = next(x for x in regard.get("lightning-attention-2").declared if x.name == "log_decay")
    for heads in (2, 4, 6, 8, 12):
        g.same(-spec.default(Sizes(1, heads, heads, 4, 4, 8, 8)), f"slopes_h{heads}", 1e-6)


@case("l0", "l1", "l2")
def layer(g: Vectors) -> None:
    """log_decay holds the stored slopes, which were rounded to float32."""
    dim, heads = g["embed_dim"], g["num_heads"]
    mechanism = regard.get("lightning-attention", layer=g["layer_idx"], layers=g["num_layers"], gate_rank=dim // heads, norm="layer")
    made = regard.nn.Attention(dim, heads, mechanism, bias=bool(g.get("bias"))).to(g.dtype)
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj", "merge_norm": "norm"}
    g.load(made, names | {"gate.0": "output_gate.0", "gate.1": "output_gate.1"})
    g.same(-made.inputs.fixed_log_decay, "slope", 1e-6)
    g.put(made.inputs.fixed_log_decay, -g("slope"))
    g.layer(made)
    g.same(stepped(made, g("x"))[0], "out")
