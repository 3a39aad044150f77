"""Checks of sinklora."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.byhand import rotary_heads
from regard.lab.checks.shared.decoding import llama
from regard.lab.checks.shared.gaps import gaps
from regard.lab.verification import check
from regard.zoo.systems.sinklora import longer, sf_attention, sf_training


def drawn(heads: int = 4, kv_heads: int = 2, length: int = 64) -> list[Tensor]:
    return [torch.randn(2, h, length, 8, dtype=torch.float64, requires_grad=True) for h in (heads, kv_heads, kv_heads)]


def closed(q: Tensor, k: Tensor, v: Tensor, group: int, n_sink: int, offsets: list[int]) -> Tensor:
    """Dense softmax under the closed-form mask, a head at a time."""
    length, outs = q.shape[2], []
    i, j = torch.arange(length)[:, None], torch.arange(length)
    for h, offset in enumerate(offsets):
        g = h * k.shape[1] // q.shape[1]
        near = torch.div(i - offset, group, rounding_mode="floor") == torch.div(j - offset, group, rounding_mode="floor")
        s = q[:, h] @ k[:, g].transpose(1, 2) / q.shape[-1] ** 0.5
        outs.append(s.masked_fill(~((j <= i) & ((j < n_sink) | near)), -torch.inf).softmax(-1) @ v[:, g])
    return torch.stack(outs, 1)


def turned(q: Tensor, k: Tensor, v: Tensor, group: int) -> Tensor:
    """LongLoRA's S2-Attn: the second half of the heads rolled, all heads cut into groups, causal in each, and rolled back."""
    heads, (b, _, length, d) = q.shape[1], q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    parts = [torch.cat((x[:, : heads // 2], x[:, heads // 2 :].roll(-group // 2, 2)), 1) for x in (q, k, v)]
    parts = [x.reshape(b, heads, length // group, group, d) for x in parts]
    s = parts[0] @ parts[1].transpose(-1, -2) / d**0.5
    o = s.masked_fill(~torch.ones(group, group, dtype=torch.bool).tril(), -torch.inf).softmax(-1) @ parts[2]
    o = o.reshape(b, heads, length, d)
    return torch.cat((o[:, : heads // 2], o[:, heads // 2 :].roll(group // 2, 2)), 1)


@check(
    "sinklora",
    "0 and 4 sinks, groups of 16 and 6, shares of shifted heads 0.5, 0.25, 0 and 1: gap to dense softmax under the closed-form mask, and of gradients",
    below=1e-10,
    control="no head shifted, no sinks",
)
def _() -> tuple[float, float]:
    own, other = [], []
    for n_sink, group, share, offsets in (
        (4, 16, 0.5, (0, 0, 8, 8)),
        (0, 16, 0.5, (0, 0, 8, 8)),
        (4, None, 0.25, (0, 0, 0, 8)),
        (3, 6, 1.0, (3, 3, 3, 3)),
        (4, 16, 0.0, (0, 0, 0, 0)),
    ):
        inputs = drawn()
        truth = closed(*inputs, group or 16, n_sink, list(offsets))
        own.append(gaps(sf_attention(*inputs, group, n_sink, share), truth, inputs))
        if any(offsets):
            other.append(naive.gap(sf_attention(*inputs, group, 0, 0.0), truth))
    return max(own), min(other)


@check(
    "sinklora",
    "nothing restored, no sinks: gap to LongLoRA's rolled groups; half restored: the first shifted head is whole, the second is not",
    below=1e-10,
    control="all restored",
)
def _() -> tuple[float, float]:
    inputs = drawn()
    truth = turned(*inputs, 16)
    half, whole = sf_attention(*inputs, 16, 0, restore=0.5), closed(*inputs, 16, 0, [0, 0, 8, 8])
    own = max(
        gaps(sf_attention(*inputs, 16, 0, restore=0.0), truth, inputs),
        naive.gap(half[:, :3], whole[:, :3]),
        naive.gap(half[:, 3], truth[:, 3]),
    )
    return own, naive.gap(sf_attention(*inputs, 16, 0), truth)


@check("sinklora", "change of any output before a changed token", below=1e-12, control="nothing restored: rolled groups leak")
def _() -> tuple[float, float]:
    q, k, v = (x.detach() for x in drawn())

    def leak(restore: float) -> float:
        before, worst = sf_attention(q, k, v, restore=restore), 0.0
        for at in (9, 40, 60, 63):
            other = [x.clone() for x in (k, v)]
            for x in other:
                x[:, :, at] += 1
            worst = max(worst, naive.gap(sf_attention(q, *other, restore=restore)[:, :, :at], before[:, :, :at]))
        return worst

    return leak(1.0), leak(0.0)


@check("sinklora", "one group of the whole text: gap to exact causal attention", below=1e-12, control="four groups")
def _() -> tuple[float, float]:
    q, k, v = (x.detach() for x in drawn(kv_heads=4))
    truth = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return naive.gap(sf_attention(q, k, v, 64, shift_heads=0.0), truth), naive.gap(sf_attention(q, k, v, 16, shift_heads=0.0), truth)


@check(
    "sinklora",
    "a model of 16 tokens made ready for 64, in training: gap to positions over 4 and dense softmax under the closed-form mask, by hand",
    below=1e-6,
    control="full attention, which runs behind the block",
)
def _() -> tuple[float, float]:
    base = llama(length=16)
    model, ids = longer(base, 64), torch.randint(1, 50, (2, 64))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 3)[1] for name in names if "lora" in name} == {"lora_A", "lora_B"} and len(names) == 2 * 2 * 4 + 2 * 2 + 2
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    with sf_training(model, n_sink=2):
        found = model(input_ids=ids, use_cache=False).logits
    after = model(input_ids=ids, use_cache=False).logits
    host, x = base.model, base.model.embed_tokens(ids)
    angles = torch.arange(64)[:, None] / 4 / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    cos, sin = (torch.cat((t, t), -1).double() for t in (angles.cos(), angles.sin()))

    def through(layer: Any, y: Tensor) -> Tensor:
        """W x + 16 / 8 B A x."""
        return layer.base_layer(y) + 2 * y @ layer.lora_A.default.weight.T @ layer.lora_B.default.weight.T

    for layer in host.layers:
        own, y = layer.self_attn, layer.input_layernorm(x)
        q, k, v = rotary_heads(own, y, cos, sin, through)
        x = x + through(own.o_proj, closed(q, k, v, 16, 2, [0, 0, 8, 8]).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    truth = base.lm_head(host.norm(x))
    return naive.gap(found, truth), naive.gap(after, truth)
