"""Recycled attention: between full steps, decoding reads the keys that the last full step attended to most (id 214; Xu et al., 2024).

full step: a = softmax(q K^T / sqrt(d)) over all, R = top-K of a over the heads of a key head;   others: softmax over R and the tokens since
fixed: every S-th step is full;   query_sim: a step is full where the mean over heads of cos(q, q at the last full step) < tau
The full cache stays: what falls is how much is read, (L + (S - 1)(K + S / 2)) / S keys a step.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.cache.layer import KeptLayer, Part
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
        self.now: dict[int, Tensor] = {}  # rows whose step is full

    def begin(self, layers: int, heads: int) -> None:
        self.reads, self.since, self.now = {at: [] for at in range(layers)}, {}, {}

    def full(self, view: View) -> Tensor:
        """(B,) bool: rows whose step is full."""
        step, rows = self.since[view.layer], len(view.query)
        if self.trigger == "fixed" or step % self.every or step == 0:
            return torch.full((rows,), step % self.stride == 0 if self.trigger == "fixed" else step == 0, device=view.query.device)
        near = F.cosine_similarity(view.query[:, :, :, -1], view.memory["asked"], dim=-1).mean((1, 2))
        return near < self.tau

    def reading(self, view: View) -> Part:
        part, near = view.part, view.part.extract
        if view.first or view.query.shape[3] > 1 or near is None:
            return part
        full = self.now[view.layer] = self.full(view)
        self.since[view.layer] += 1
        if bool(full.all()):
            read = part
        elif not bool(full.any()):
            read = near
        else:
            chosen = (
                torch.zeros_like(part.places).scatter_add(2, near.places, near.alive.long()) > 0
            )  # nothing is dropped: entry n is token n
            read = replace(part, alive=part.alive & (chosen | full[:, None, None]), whole=None, extract=None)
        self.reads[view.layer].append(read.places.shape[2] if read.everything() else int(read.alive.sum(-1).max()))
        return read

    def run(self, layer: KeptLayer, number: int, view: View) -> None:
        """After a full step choose anew; nothing is dropped."""
        part, last = view.part, view.length - 1
        old = part.extract
        if view.first or view.query.shape[3] > 1 or old is None:
            self.since[view.layer] = 0
            rows = torch.ones(len(view.query), dtype=torch.bool, device=view.query.device)
        else:
            rows = self.now[view.layer]
        if not bool(rows.any()):
            return
        a = next(view.rows(1))[0][:, :, :, 0]
        score = a.sum(2) if self.join == "sum" else a.amax(2)
        if self.pool > 1:
            score = F.avg_pool1d(score, self.pool, 1, self.pool // 2)
        index = score.masked_fill(~part.alive, -torch.inf).topk(min(self.k, view.length), -1).indices
        index = torch.cat((index, torch.full_like(index[..., :1], last)), -1)  # the step's own token is the first since
        there = part.alive.gather(2, index)
        there[..., :-1] &= index[..., :-1] != last
        query = view.query[:, :, :, -1].clone()
        if old is not None and not bool(rows.all()):
            other = max(0, old.places.shape[2] - index.shape[2]), max(0, index.shape[2] - old.places.shape[2])
            index = torch.where(rows[:, None, None], F.pad(index, (0, other[0])), F.pad(old.places, (0, other[1])))
            there = torch.where(rows[:, None, None], F.pad(there, (0, other[0])), F.pad(old.alive, (0, other[1])))
            query = torch.where(rows[:, None, None, None], query, view.memory["asked"])
        near = replace(part, extract=None).kept(index)
        near.alive = there
        layer.parts[number] = replace(part, extract=near)
        view.memory["asked"] = query


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
