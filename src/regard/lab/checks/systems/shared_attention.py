"""Checks of shared-attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard import taps
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gradients
from regard.lab.checks.shared.decoding import llama
from regard.lab.verification import check
from regard.zoo.systems.shared_attention import SharedAttention, late_run, map_similarity


def by_hand(model: Any, ids: Tensor, source: int, sharers: list[int], uniform: bool = False) -> Tensor:
    """The model layer by layer, heads in loops; sharers read the source's weights (or the mean of their values so far)."""
    x, length, p = model.model.embed_tokens(ids), ids.shape[1], torch.zeros(())
    cos, sin = model.model.rotary_emb(x, torch.arange(length)[None])

    def turned(t: Tensor) -> Tensor:
        half = t.shape[-1] // 2
        return t * cos[:, None] + torch.cat((-t[..., half:], t[..., :half]), -1) * sin[:, None]

    for number, layer in enumerate(model.model.layers):
        attention, y = layer.self_attn, layer.input_layernorm(x)
        v = attention.v_proj(y).view(*ids.shape, -1, 8).transpose(1, 2)
        if number not in sharers:
            q, k = (turned(proj(y).view(*ids.shape, -1, 8).transpose(1, 2)) for proj in (attention.q_proj, attention.k_proj))
            s = torch.stack([q[:, h] @ k[:, h // 2].transpose(1, 2) * 8**-0.5 for h in range(4)], 1)
            own = s.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
            p = own if number == source else p
        else:
            own = torch.ones(length, length, dtype=F64).tril() / torch.arange(1, length + 1)[:, None] if uniform else p
            own = own.expand(len(ids), 4, -1, -1)
        o = torch.cat([own[:, h] @ v[:, h // 2] for h in range(4)], -1)
        x = x + attention.o_proj(o)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))


@check(
    "shared-attention",
    "logits and gradients with layers 2 and 3 of 5 sharing layer 1: gap to loops that reuse its weights",
    below=1e-6,
    control="the model as it was",
)
def _() -> tuple[float, float]:
    model, ids = llama(layers=5), torch.randint(50, (2, 9))
    truth = by_hand(model, ids, 1, [2, 3])
    leaves = [p for name, p in model.named_parameters() if "layers.2" not in name and "layers.3" not in name]
    wanted = gradients(truth, leaves)
    before = model(ids, use_cache=False).logits
    with SharedAttention(model, 1, [2, 3]):
        found = model(ids, use_cache=False).logits
        own = max(naive.gap(found, truth), *[naive.gap(a, b) for a, b in zip(gradients(found, leaves), wanted, strict=True)])
    assert torch.equal(model(ids, use_cache=False).logits, before)
    return own, naive.gap(before, truth)


@check(
    "shared-attention",
    "token by token with values alone in the sharers' cache: gap to the whole",
    below=1e-6,
    control="each token without a cache",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = llama(layers=5), torch.randint(50, (2, 9))
    with SharedAttention(model, 2):
        whole, outs, alone = model(ids, use_cache=False).logits, [], []
        cache: Any = None
        for t in range(9):
            out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            outs.append(out.logits)
            alone.append(model(ids[:, t : t + 1], use_cache=False).logits)
    sizes = [layer.keys.numel() + layer.values.numel() for layer in cache.layers]
    assert sizes == [2 * sizes[3]] * 3 + [2 * 2 * 9 * 8] * 2
    return naive.gap(torch.cat(outs, 1), whole), naive.gap(torch.cat(alone, 1), whole)


@check("shared-attention", "parameters given up, less two matrices a sharer", below=0.0, control="before they are dropped")
def _() -> tuple[float, float]:
    model = llama(layers=4, kv_heads=4)
    count = sum(p.numel() for p in model.parameters())
    shared = SharedAttention(model, 1)
    kept = sum(p.numel() for one in shared.kept.values() for p in one.parameters()) - 2 * 2 * 32 * 32
    fewer = count - sum(p.numel() for p in model.parameters())
    shared.drop()
    shared.remove()
    ids = torch.randint(50, (1, 5))
    assert model(ids, use_cache=False).logits.isfinite().all()
    return abs(fewer - 2 * 2 * 32 * 32), float(kept)


@check(
    "shared-attention",
    "uniform weights put in at the source reach every sharer: gap to running means of their values",
    below=1e-6,
    control="layers that compute their own",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = llama(layers=4), torch.randint(50, (2, 7))

    def even(p: Tensor) -> Tensor:
        return (torch.ones_like(p).tril() / torch.arange(1, p.shape[-1] + 1)[:, None]).to(p.dtype)

    truth = by_hand(model, ids, 1, [1, 2, 3], uniform=True)
    with taps.edit(model, {"weights": even}, layers=[1]):
        plain = model(ids, use_cache=False).logits
        with SharedAttention(model, 1):
            found = model(ids, use_cache=False).logits
    return naive.gap(found, truth), naive.gap(plain, truth)


@check(
    "shared-attention",
    "likeness of averaged maps by loops, and the late run above a threshold: gap",
    below=1e-6,
    control="maps of single heads compared",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, probes = llama(layers=3), [torch.randint(50, (2, 6)) for _ in range(2)]
    sums, single = [torch.zeros(6, 6, dtype=F64) for _ in range(3)], torch.zeros(3, 36, dtype=F64)
    for ids in probes:
        with taps.read(model, "weights") as seen:
            model(ids, use_cache=False)
        for layer in range(3):
            for row in range(2):
                for head in range(4):
                    sums[layer] += seen["weights", layer][row, head] / 4
            single[layer] = seen["weights", layer][0, 0].flatten()
    truth = torch.stack([torch.stack([(a * b).sum() / (a.norm() * b.norm()) for b in sums]) for a in sums])
    likeness = torch.tensor([[1, 0.9, 0.2, 0.1], [0.9, 1, 0.5, 0.6], [0.2, 0.5, 1, 0.9], [0.1, 0.6, 0.9, 1]])
    assert late_run(likeness, 0.8) == (2, [3]) and late_run(likeness, 0.45) == (1, [2, 3]) and late_run(likeness, 0.05) == (0, [1, 2, 3])
    units = single / single.norm(dim=1, keepdim=True)
    return naive.gap(map_similarity(model, probes), truth), naive.gap(units @ units.T, truth)
