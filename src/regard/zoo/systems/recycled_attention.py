"""Recycled attention: between full steps, decoding reads the keys that the last full step attended to most (id 214; Xu et al., 2024).

full step: a = softmax(q K^T / sqrt(d)) over all, R = top-K of a over the heads of a key head;   others: softmax over R and the tokens since
fixed: every S-th step is full;   query_sim: a step is full where the mean over heads of cos(q, q at the last full step) < tau
The full cache stays: what falls is how much is read, (L + (S - 1)(K + S / 2)) / S keys a step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.cache.layer import Part
from regard.cache.policy import Policy
from regard.cache.view import View
from regard.catalog.registry import register
from regard.errors import RegardError


@register("recycled-attention", kind="policy")
class RecycledAttention(Policy):
    """Decoding in two kinds of steps; prompts are attended whole, and their last token chooses first.

    stride: S. k: K. trigger: "fixed" or "query_sim", which looks every `every` steps and takes threshold tau. join: how the heads of a key head
    are joined, "sum" or "max". pool: width of an average over neighbours before the choice (1: none). reads: keys read by a key head at
    every step, by layer, the most of a batch. Rows of a batch choose alone.
    """

    def __init__(
        self, stride: int = 10, k: int = 4096, trigger: str = "fixed", tau: float = 0.9, every: int = 1, join: str = "sum", pool: int = 1
    ):
        if min(stride, k, every, pool) < 1 or pool % 2 == 0 or trigger not in ("fixed", "query_sim") or join not in ("sum", "max"):
            raise RegardError(
                f"stride={stride}, k={k}, trigger={trigger!r}, every={every}, join={join!r}, pool={pool}: expected positive numbers, an odd "
                "pool, 'fixed' or 'query_sim', and 'sum' or 'max'"
            )
        super().__init__(1.0)
        self.stride, self.k, self.trigger, self.tau, self.every, self.join, self.pool = stride, k, trigger, tau, every, join, pool
        self.reads: dict[int, list[int]] = {}
        self.since: dict[int, int] = {}
        self.asked: dict[int, Tensor] = {}

    def begin(self, layers: int, heads: int) -> None:
        self.reads, self.since, self.asked = {at: [] for at in range(layers)}, {}, {}

    def full(self, view: View) -> Tensor:
        """(B,) bool: rows whose step is full."""
        step, rows = self.since[view.layer], len(view.query)
        if self.trigger == "fixed" or step % self.every or step == 0:
            return torch.full((rows,), step % self.stride == 0 if self.trigger == "fixed" else step == 0, device=view.query.device)
        near = F.cosine_similarity(view.query[:, :, :, -1], self.asked[view.layer], dim=-1).mean((1, 2))
        return near < self.tau

    def reading(self, view: View) -> Part:
        if view.first or view.query.shape[3] > 1:
            return view.part
        notes, whole = view.part.notes, self.full(view)
        notes["recycled"][..., -1] = 1
        notes["whole"] = whole.float()[:, None, None].expand(*view.part.alive.shape).clone()
        wanted = view.part.alive & ((notes["recycled"] > 0) | whole[:, None, None])
        counts = wanted.sum(-1)
        self.reads[view.layer].append(int(counts.max()))
        self.since[view.layer] += 1
        if bool(whole.any()):
            part = view.part.mapped(lambda x: x)
            part.alive = wanted
            return part
        order = (~wanted).to(torch.uint8).argsort(dim=2, stable=True)[..., : int(counts.max())]
        part = view.part.kept(order)
        part.alive = wanted.gather(2, order)
        return part

    def run(self, layer: Any, number: int, view: View) -> None:
        """After a full step choose anew; nothing is dropped."""
        notes, n = view.part.notes, view.query.shape[3]
        rows = (
            torch.ones(len(view.query), dtype=torch.bool, device=view.query.device) if n > 1 or view.first else notes["whole"][:, 0, 0] > 0
        )
        if n > 1 or view.first:
            self.since[view.layer] = 0
        if not bool(rows.any()):
            return
        a = next(view.rows(1))[0][:, :, :, 0]
        score = a.sum(2) if self.join == "sum" else a.amax(2)
        if self.pool > 1:
            score = F.avg_pool1d(score, self.pool, 1, self.pool // 2)
        score = score.masked_fill(~view.part.alive, -torch.inf)
        chosen = torch.zeros_like(score).scatter(2, score.topk(min(self.k, view.length), -1).indices, 1.0)
        chosen[..., -1] = 1  # the step's own token is the first since
        query = view.query[:, :, :, -1].clone()
        if "recycled" in notes and not bool(rows.all()):
            chosen = torch.where(rows[:, None, None], chosen, notes["recycled"])
            query = torch.where(rows[:, None, None, None], query, self.asked[view.layer])
        notes["recycled"], self.asked[view.layer] = chosen, query


def recycled_mask(weights: Tensor, stride: int, k: int) -> Tensor:
    """For continued training: weights (B, H, L, L) of causal attention -> (B, H, L, L) bool, what each row reads.

    Row t reads the k keys of most weight in row stride * floor(t / stride), and the rows since; that row itself reads everything.
    """
    if stride < 1 or k < 1:
        raise RegardError(f"stride={stride}, k={k}: expected positive numbers")
    length = weights.shape[-1]
    at = torch.arange(length, device=weights.device)
    base = at // stride * stride
    top = weights.index_select(2, base).topk(min(k, length), -1).indices
    chosen = torch.zeros_like(weights, dtype=torch.bool).scatter(3, top, True) & (at[None] <= base[:, None])
    since = (at[None] >= base[:, None]) & (at[None] <= at[:, None])
    return chosen | since | ((at == base)[:, None] & (at[None] <= at[:, None]))
