"""The locality dial: attention blended between free and confined to semantic blocks, at any time (id 295; Diederich, 2025).

p_i = softmax_j(s_ij - mu [block_i != block_j] + kappa q_i.a_block(j) + rule_ij),   mu = -log(1 - dial)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...algebra import Input, Modified, Weighted
from ...catalog.registry import register


def dialled(s: Tensor, query_block: Tensor, key_block: Tensor, dial: Tensor, rules: Tensor) -> Tensor:
    return s + torch.where(query_block != key_block, torch.log1p(-dial), 0.0) + rules


@register("localist-dial")
def localist_dial() -> Weighted:
    """Inputs: `query_block` (B, Lq), `key_block` (B, Lk), ids of blocks as numbers (default: one block); `dial`, broadcasting to (B, H, Lq, 1), 0
    free .. 1 confined (a token may have its own; just below 1 stays finite); `rules` (B, H, Lq, Lk), logits of injected rules and anchors.
    Nothing is retrained when it turns. `regard.lab.experiments.localist` has penalties, anchors, bounds and measures."""
    inputs = (
        Input("query_block", "bq", default=0.0),
        Input("key_block", "bk", default=0.0),
        Input("dial", "bhq", default=0.0),
        Input("rules", "bhqk", default=0.0),
    )
    return Weighted(position=Modified(dialled, inputs))
