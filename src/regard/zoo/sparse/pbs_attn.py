"""PBS-Attn: keys sorted by importance inside segments, so that few blocks hold the mass (id 234; Wang et al., 2025).

u_j = mean over the last queries of softmax(q_last k^T)_j; keys of each complete segment by falling u (queries stay in place)
row u: the own segment, the first block, and the fewest pooled-score blocks of earlier segments that hold `threshold`
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import Chosen, Program, Selection, Since, View, Weighted, bind
from regard.algebra.blocks import cut, heads_of, probabilities, top_p
from regard.algebra.permute import Permutation, by_value
from regard.catalog.registry import register
from regard.engine.composed import Call
from regard.errors import RegardError


@register("pbs-attn")
def pbs(threshold: float = 0.9, block_size: int = 128, segment: int = 256, first: bool = True) -> Program:
    """threshold: pooled mass to keep outside the own segment (1: everything). segment: tokens within which keys change places, a multiple of
    block_size; tokens after the last whole one stay. first: always the block that token 0 has gone to. Pooled sums are divided by block_size
    even where the last block is shorter, as released. Prompts of at most one segment run dense."""
    if segment % block_size or not 0 < threshold <= 1:
        raise RegardError(
            f"threshold={threshold}, segment={segment}: expected 0 < threshold <= 1 and a multiple of block_size={block_size}"
        )
    return Program(bind(permuted_sparse, threshold=threshold, block_size=block_size, segment=segment, force=first), under="causal")


def order_of(q: Tensor, k: Tensor, block_size: int, segment: int) -> Permutation:
    """Keys by the attention that the last block of queries (times scale) pays to them, a head; the softmax is over whole segments' keys."""
    whole = k.shape[-2] // segment * segment
    p = (q[..., -block_size:, :] @ k[..., :whole, :].transpose(-1, -2)).softmax(-1).mean(-2)
    return by_value(torch.nn.functional.pad(p, (0, k.shape[-2] - whole)), segment)


def pbs_plan(
    q: Tensor, k: Tensor, view: View, since: Tensor, *, threshold: float, block_size: int, segment: int, force: bool = True
) -> Selection:
    """Which blocks of permuted keys each block of queries reads; since (B, H, 1, L): the keys' old places."""
    count, per = -(-k.shape[-2] // block_size), segment // block_size
    u = (torch.arange(0, q.shape[-2], block_size, device=q.device) + view.first) // block_size
    w = torch.arange(count, device=q.device)
    past = (w // per) < (u // per)[:, None]
    own = (w // per) == (u // per)[:, None]
    p = probabilities(cut(q, block_size).mean(-2) @ cut(k, block_size).mean(-2).transpose(-1, -2), past)
    keep = past.expand(p.shape) if threshold >= 1 else top_p(p, threshold)
    if not force:
        return Selection(keep | own, block_size, block_size)
    first = (since[:, :, 0] == 0).long().argmax(-1)[..., None, None] // block_size  # the block that token 0 has gone to
    return Selection(keep | own | (past & (w == first)), block_size, block_size)


def permuted_sparse(q: Tensor, k: Tensor, v: Tensor, call: Call, *, threshold: float, block_size: int, segment: int, force: bool) -> Tensor:
    length = k.shape[-2]
    if q.shape[-2] != length or length <= segment:
        return call.attend(q, k, v, Weighted(), mask=call.mask, scale=call.scale)
    k, v = heads_of(k, q.shape[1]), heads_of(v, q.shape[1])
    order = order_of((q * call.logit_scale(q)).detach(), k.detach(), block_size, segment)
    plan = Chosen(bind(pbs_plan, threshold=threshold, block_size=block_size, segment=segment, force=force), ahead=True)
    inner = Weighted(mask=Since(), select=plan)
    return call.attend(q, order.apply(k), order.apply(v), inner, scale=call.scale, since=order.order)
