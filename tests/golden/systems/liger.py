"""Liger's three forms of an attention layer, in one pass and a token at a time."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

from regard.zoo.systems.liger import LigerAttention


@case("c0", "c1", "c2")
def layer(g: Vectors) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention

    host = LlamaAttention(LlamaConfig(hidden_size=8, num_attention_heads=4, num_key_value_heads=2), 0)
    made = LigerAttention(host, g["kind"], g["window"], slots=g["slots"]).to(g.dtype)
    parameters, x = g.fill(made), g.leaf("x")
    turn = (torch.ones(1, x.shape[1], 2, dtype=g.dtype), torch.zeros(1, x.shape[1], 2, dtype=g.dtype))
    g.layer(lambda x: made.run(x, turn)[0], **parameters)
    state, outs = None, []
    for t in range(x.shape[1]):
        y, state = made.run(x[:, t : t + 1].detach(), (turn[0][:, t : t + 1], turn[1][:, t : t + 1]), None, state)
        outs.append(y)
    g.same(torch.cat(outs, 1), "out")
