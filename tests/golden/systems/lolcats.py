"""LoLCATs: softmax over a window beside learned feature maps of older keys, in one pass and a token at a time."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from regard.adapt.student import Tokens
from regard.zoo.systems.lolcats import LolcatsAttention


@case("c0", "c1", "c2", "c3")
def hybrid(g: Vectors) -> None:
    host = LlamaAttention(LlamaConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2), 0)
    made = LolcatsAttention(host, g["window"], g["feature_dim"], g["form"], affine=g["affine"]).to(g.dtype)
    g.load(made, {"query_map": "map_q", "key_map": "map_k", "gamma": "gamma"})
    leaves = g.leaves("x_q", "x_k", "x_v")
    q, k, v = leaves.values()
    out, _ = made.mix(Tokens(q, k, v, q, k, None), None)
    g.same(out, "out")
    g.gradients(g.weigh(out), leaves | {"map_q": made.query_map, "map_k": made.key_map, "gamma": made.gamma})
    state, outs = None, []
    for t in range(q.shape[2]):
        q1, k1, v1 = (x[:, :, t : t + 1].detach() for x in (q, k, v))
        one, state = made.mix(Tokens(q1, k1, v1, q1, k1, None), state)
        outs.append(one)
    g.same(torch.cat(outs, 2), "out")
