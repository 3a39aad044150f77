"""LongSpec: the draft's training pass."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

from regard.zoo.systems.longspec import LongSpec

NAMES = [(rf"^{ours}\.", f"self_attn.{theirs}_proj.") for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))]
NAMES += [(r"^cross_q", "cross_attn.q_proj"), (r"^cross_out", "cross_attn.o_proj"), (r"^(gate|up|down)", r"mlp.\1_proj")]
NAMES += [("norm1", "input_layernorm"), ("norm2", "post_self_attention_layernorm"), ("norm3", "post_cross_attention_layernorm")]


@case("c0", "c1")
def draft(g: Vectors) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 6, "num_hidden_layers": 1}
    host = LlamaForCausalLM(LlamaConfig(vocab_size=16, rms_norm_eps=1e-5, tie_word_embeddings=True, **sizes)).to(g.dtype)
    table = host.get_input_embeddings()
    g.put(table.weight, "embed")
    made = LongSpec(host, window=g["window"])
    parameters = g.fill(made, *NAMES)
    half = 10000.0 ** (-torch.arange(0, 4, 2).double() / 4)
    made.angles = lambda x, places: tuple(  # type: ignore[assignment, return-value]
        f(torch.cat((places.double()[..., None] * half,) * 2, -1)).to(x.dtype) for f in (torch.cos, torch.sin)
    )
    ids = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    out = made(ids, g("keys"), g("values"), g["stale"])
    g.same(out, "out")
    g.gradients(g.weigh(out), {"embed": table.weight} | parameters)
