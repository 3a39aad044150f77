"""The locality dial: attention blended between free and confined to semantic blocks, at any time (id 295; Diederich, 2025).

p_i = softmax_j(s_ij - mu [block_i != block_j] + kappa q_i.a_block(j) + rule_ij),   mu = -log(1 - dial)

`LocalistDecoder` is the minimal language model: tokens belong to blocks, and the dial turns while it runs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from regard.algebra import Input, Modified, Rope, Weighted
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.attention import Attention
from regard.nn.decoder import Block


def dialled(s: Tensor, query_block: Tensor, key_block: Tensor, dial: Tensor, rules: Tensor) -> Tensor:
    return s + torch.where(query_block != key_block, torch.log1p(-dial), 0.0) + rules


@register("localist-dial")
def localist_dial() -> Weighted:
    """Inputs: `query_block` (B, Lq), `key_block` (B, Lk), ids of blocks as numbers (default: one block); `dial`, broadcasting to (B, H, Lq, 1), 0
    free .. 1 confined (a token may have its own; just below 1 stays finite); `rules` (B, H, Lq, Lk), logits of injected rules and anchors.
    Nothing is retrained when it turns. `regard.zoo.softmax.localist_dial` has penalties, anchors, bounds and measures."""
    inputs = (
        Input("query_block", "bq", default=0.0),
        Input("key_block", "bk", default=0.0),
        Input("dial", "bhq", default=0.0),
        Input("rules", "bhqk", default=0.0),
    )
    return Weighted(position=Modified(dialled, inputs))


def group_penalty(groups: list[Tensor]) -> Tensor:
    """sum_b w_b |W^(b)|_F with w_b = sqrt(size of the group): added to the task's loss, times lambda."""
    return sum((math.sqrt(w.numel()) * w.norm() for w in groups), torch.zeros(()))


@torch.no_grad()
def proximal_step(groups: list[Tensor], lr: float, strength: float) -> None:
    """W <- W (1 - lr lambda w_b / |W|_F)_+ in place, after a gradient step of the task's loss alone: whole groups become exactly zero."""
    for w in groups:
        norm = w.norm()
        w.mul_(torch.relu(1 - lr * strength * math.sqrt(w.numel()) / norm) if norm > 0 else 0.0)


def critical_strength(gradient_at_zero: Tensor) -> float:
    """The lambda from which a group stays zero: |grad L at W = 0|_F / w_b (the KKT condition)."""
    return float(gradient_at_zero.norm()) / math.sqrt(gradient_at_zero.numel())


def anchors(tokens: Tensor, labels: Tensor, blocks: int) -> Tensor:
    """(blocks, dim): each block's unit vector, the normalised mean of its tokens (N, dim) with labels (N,) minus the mean of all."""
    centred = tokens - tokens.mean(0)
    return torch.nn.functional.normalize(torch.stack([centred[labels == b].mean(0) for b in range(blocks)]), dim=-1)


def anchor_logits(q: Tensor, key_block: Tensor, anchor: Tensor, kappa: float) -> Tensor:
    """kappa q_i.a_block(j): q (B, H, Lq, D), key_block (B, Lk) integers, anchor (blocks, D) -> (B, H, Lq, Lk), for the input `rules`."""
    return kappa * torch.einsum("bhqd,bkd->bhqk", q, anchor[key_block])


def rule_logits(query_type: Tensor, key_block: Tensor, rules: dict[tuple[int, int], float]) -> Tensor:
    """(B, 1, Lq, Lk) logits from rules {(query type, key block): bias}; -inf forbids."""
    out = torch.zeros(*query_type.shape, key_block.shape[-1])
    for (kind, block), bias in rules.items():
        hit = (query_type == kind)[..., :, None] & (key_block == block)[..., None, :]
        out = torch.where(hit, bias, out)
    return out.unsqueeze(-3)


def leak(weights: Tensor, inside: Tensor) -> Tensor:
    """(...,): weight outside each row's relevant block; inside (..., Lq, Lk) bool. Pointer fidelity is 1 - leak."""
    return (weights * ~inside).sum(-1)


def leak_bound(inside: Tensor, margin: float, temperature: float = 1.0) -> Tensor:
    """(n_out / n_in) e^(-margin / T): what may leak when every inside logit exceeds every outside one by the margin."""
    n_in, n_out = inside.sum(-1).double(), (~inside).sum(-1).double()
    if bool((n_in == 0).any()):
        raise RegardError("a row has no relevant key; expected at least one in every row of `inside`")
    return n_out / n_in * math.exp(-margin / temperature)


def entropy_bound(inside: Tensor, leaked: Tensor) -> Tensor:
    """log n_in + H2(leak) + leak log n_out, in nats, for rows that leak `leaked`."""
    n_in, n_out = inside.sum(-1).double(), (~inside).sum(-1).double()
    binary = -torch.special.xlogy(leaked, leaked) - torch.special.xlogy(1 - leaked, 1 - leaked)
    return n_in.log() + binary + torch.special.xlogy(leaked, n_out.clamp_min(1))


class LocalistDecoder(nn.Module):
    """tokens (B, L) -> logits (B, L, vocab): a decoder whose vocabulary is cut into blocks, block_of (vocab,) integers.

    dial: 0 (free) .. 1 (confined to a token's own block), a number or one a layer; `model.dial` may be changed at any time. `groups()`: the
    weights that the group penalty counts, rows of every layer's value projection by head.
    """

    block_of: Tensor

    def __init__(self, block_of: Tensor, *, dim: int = 32, layers: int = 2, heads: int = 2, hidden: int | None = None):
        super().__init__()
        if block_of.dim() != 1 or block_of.is_floating_point():
            raise RegardError(
                f"block_of {tuple(block_of.shape)} {block_of.dtype}; expected a block's number for each symbol, (vocab,) integers"
            )
        self.register_buffer("block_of", block_of)
        self.embed = nn.Embedding(len(block_of), dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList([Block(dim, self.layer(dim, heads), hidden or 2 * dim) for _ in range(layers)])
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.dial: float | list[float] = 0.0

    @staticmethod
    def layer(dim: int, heads: int) -> Attention:
        made = Attention(dim, heads, localist_dial())
        made.rope = Rope()  # beside the blocks, which stand where a mechanism's own positions would
        return made

    def forward(self, tokens: Tensor) -> Tensor:
        dials = self.dial if isinstance(self.dial, list) else [self.dial] * len(self.blocks)
        if len(dials) != len(self.blocks) or not all(0 <= one <= 1 for one in dials):
            raise RegardError(f"dial={self.dial}; expected a number from 0 to 1, or one a layer ({len(self.blocks)})")
        x, own = self.embed(tokens), self.block_of[tokens].to(self.embed.weight.dtype)
        for block, dial in zip(self.blocks, dials, strict=True):
            at = x.new_full((1, 1, 1), dial)
            y = block.mixer(block.norm1(x), query_block=own, key_block=own, dial=at)  # type: ignore[operator]
            x = x + y
            x = x + block.mlp(block.norm2(x))  # type: ignore[operator]
        return self.norm(x) @ self.embed.weight.T  # type: ignore[no-any-return]

    def groups(self) -> list[Tensor]:
        found: list[Tensor] = []
        for block in self.blocks:
            layer: Any = block.mixer
            found += layer.v.weight.split(layer.value_dim)
        return found
