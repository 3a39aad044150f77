"""The graph transformer's layer with and without an edge stream, by BatchNorm (eval) and LayerNorm."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

import regard


@case("c0", "c1", "c2", "c3")
def layer(g: Vectors) -> None:
    edge, norm, bias = g.has("e"), "batch" if g.config in ("c0", "c2") else "layer", g.config == "c1"
    heads = 2 if g.config == "c3" else 4
    made = regard.nn.GraphTransformerLayer(16, heads, edge_stream=edge, norm=norm, bias=bias).to(g.dtype).eval()
    names: dict[str, str] = {name: f"attention.{name.upper()}" for name in "qkv"} | ({"e": "attention.proj_e"} if edge else {})
    for stream, tail in (("nodes", "_h" if edge else ""), ("edges", "_e"))[: 1 + edge]:
        names |= {f"{stream}.out": f"O{tail}", f"{stream}.up": f"FFN{tail}_layer1", f"{stream}.down": f"FFN{tail}_layer2"}
        for at in (1, 2):
            theirs = f"{norm}_norm{at}{tail}"
            names[f"{stream}.norm{at}"] = theirs
            if norm == "batch":
                names |= {f"{stream}.norm{at}.{x}": f"{theirs}.{x}" for x in ("running_mean", "running_var")}
    g.load(made, names)
    leaves = g.leaves("h", "e") if edge else g.leaves("h")
    out_h, out_e = made(leaves["h"], torch.stack((g("src"), g("dst"))), leaves.get("e"))
    g.same(out_h, "out_h")
    loss = g.weigh(out_h, "w_h")
    if edge:
        g.same(out_e, "out_e")
        loss = loss + g.weigh(out_e, "w_e")
    g.gradients(loss, leaves)
