"""The locality dial: attention blended between free and confined to semantic blocks, at any time (id 295; Diederich, 2025).

p_i = softmax_j(s_ij - mu [block_i != block_j] + kappa q_i.a_block(j) + rule_ij),   mu = -log(1 - dial)

Not built: the language model over a vocabulary of blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Input, Modified, Weighted
from regard.catalog.registry import register
from regard.errors import RegardError


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
