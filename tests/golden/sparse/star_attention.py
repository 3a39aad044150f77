"""star-attention: the caches of every host after the context, logits of the query, and merged partial results."""

import torch
from golden.vectors import Vectors, case

import regard
from regard.parallel import star_decode, star_prefill


class Untied(regard.nn.Decoder):
    """The released model has an output matrix of its own; a decoder shares that of its embedding."""

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) @ self.head.T


def model_of(v: Vectors) -> Untied:
    h = v.meta["hyper"]
    model = Untied(vocab=h["vocab"], dim=h["hidden"], layers=h["layers"], heads=h["heads"], kv_heads=h["kv_heads"], hidden=h["inter"])
    model = model.to(v.dtype).eval()
    model.head = v("p.lm_head.weight")
    v.put(model.embed.weight, "p.model.embed_tokens.weight")
    v.put(model.norm.weight, "p.model.norm.weight")
    for at, block in enumerate(model.blocks):
        names = {
            "mixer.q": "self_attn.q_proj", "mixer.k": "self_attn.k_proj", "mixer.v": "self_attn.v_proj", "mixer.out": "self_attn.o_proj",
            "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
            "mlp.down": "mlp.down_proj",
        }  # fmt: skip
        for ours, theirs in names.items():
            v.put(block.get_submodule(ours).weight, f"p.model.layers.{at}.{theirs}.weight")
    return model


@case("c0", "c1", "c2")
@torch.no_grad()
def phases(v: Vectors) -> None:
    model, tokens = model_of(v), v("query").long()
    for pieces in (tokens[None].split(len(tokens), 1), tokens[None].split(1, 1)):
        state = star_prefill(model, v("ctx").long()[None], v["block"], v["anchor"], hosts=v["hosts"])
        for layer in range(v.meta["hyper"]["layers"]):
            for at, name in enumerate("kv"):
                shards = [state.shards[host][layer][at] for host in range(v["hosts"])]
                v.same(torch.cat(shards, 2), f"{name}_l{layer}")
        v.same(torch.cat([star_decode(state, part) for part in pieces], 1)[0], "qlogits")


@case("merge")
def merging(v: Vectors) -> None:
    q, parts = v("mq").transpose(1, 2), []
    for at in range(3):
        out, stats = regard.attend_with_stats(q, *(v(f"m{name}{at}").transpose(1, 2) for name in "kv"))
        v.same(out.transpose(1, 2), f"block_out{at}")
        v.same((stats.shift + stats.total.log()).squeeze(-1), f"block_lse{at}")
        parts.append((out, stats))
    out, stats = regard.merge(regard.Weighted(), parts)
    v.same(out.transpose(1, 2), "merged_out")
    v.same((stats.shift + stats.total.log()).squeeze(-1), "merged_lse")
