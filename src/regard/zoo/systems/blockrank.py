"""BlockRank: many documents ranked in one context, each reading the instruction and itself, the query reading all (id 243; Gupta et al., 2025).

(B, M, H) tokens: block 0 causal; block b: block 0 and causal itself; the last: all blocks and causal itself.   Cost O(M H^2)
r_d = sum over a document's tokens of mean over heads and two signal queries of softmax over all documents' tokens;  loss = -(lse_pos r/tau - lse r/tau)
Not built: decoding the answer's ids with a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapt.attending import attending
from regard.algebra import Causal, Mask, Padding, Where, bind
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError


def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor, size: int, last: int) -> Tensor:
    u, w = i // size, j // size
    return (j <= i) & ((w == 0) | (w == u) | (u == last))


def blockrank_mask(blocks: int, size: int) -> Mask:
    """The same pairs as a mask of the engine, for `blocks` blocks of `size` tokens; add Padding() for shorter ones."""
    return Causal() & Where(bind(sees, size=size, last=blocks - 1))


def checked(mask: Tensor, length: int) -> tuple[int, int]:
    """(M, H) of a mask (B, M, H) over `length` tokens."""
    if mask.dim() != 3 or mask.shape[1] < 2 or mask.shape[1] * mask.shape[2] != length:
        raise RegardError(f"mask {tuple(mask.shape)} for {length} tokens: expected (B, M, H) with M * H tokens and at least 2 blocks")
    there = mask.bool()
    if bool((there[..., :-1] & ~there[..., 1:]).any()):
        raise RegardError("mask: expected blocks that are padded on the left")
    return mask.shape[1], mask.shape[2]


@register("blockrank", kind="function")
def blockrank_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """q (B, N, M H, D), k, v (B, Nkv, M H, D), mask (B, M, H) of the real tokens, blocks padded on the left -> (B, N, M H, Dv); padding gives 0."""
    blocks, size = checked(mask, q.shape[2])
    there = mask.bool()

    def part(at: slice) -> list[Tensor]:
        """Blocks `at` as rows of the batch: (B n, heads, H, D)."""
        return [x.unflatten(2, (blocks, size))[:, :, at].transpose(1, 2).flatten(0, 1) for x in (q, k, v)]

    def run(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attend(q, k, v, mask=Causal() & Padding(), keep=keep, scale=scale)

    first = part(slice(0, 1))
    outs = [run(first[0], first[1], first[2], there[:, 0])[:, :, None]]
    if blocks > 2:
        q_mid, *own = part(slice(1, blocks - 1))
        k_mid, v_mid = (torch.cat((x.repeat_interleave(blocks - 2, 0), y), 2) for x, y in zip(first[1:], own, strict=True))
        keep = torch.cat((there[:, :1].expand(-1, blocks - 2, -1), there[:, 1:-1]), 2).flatten(0, 1)
        outs.append(run(q_mid, k_mid, v_mid, keep).unflatten(0, (-1, blocks - 2)).transpose(1, 2))
    outs.append(run(part(slice(blocks - 1, blocks))[0], k, v, there.flatten(1))[:, :, None])
    return torch.cat(outs, 2).flatten(2, 3) * there.flatten(1)[:, None, :, None]


def blockrank_positions(mask: Tensor, offset: int = 16384) -> Tensor:
    """(B, M, H) -> positions (B, M H): every document begins behind the instruction, the last block at `offset`; padding is at 0."""
    own = mask.long().cumsum(-1)
    own[:, 1:-1] += own[:, :1, -1:]
    own[:, -1] += offset
    return ((own - 1).clamp_min(0) * mask.long()).flatten(1)


def document_scores(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """r (B, M - 2), rows of sum 1: scores (B, N, n, M H), scaled logits of the last n queries; labels (B, M H), -100 where nothing is asked: the
    first asked token and the one before it are the signal queries."""
    blocks, size = checked(mask, scores.shape[-1])
    asked = labels[:, -scores.shape[2] :] != -100
    at = asked.int().argmax(-1)
    if blocks < 3 or not bool(asked.any(-1).all()) or int(at.min()) < 1:
        raise RegardError(
            f"labels: expected an asked token, and one before it, among the last {scores.shape[2]} queries of each row, and a document"
        )
    signal = scores.take_along_dim(torch.stack((at - 1, at), 1)[:, None, :, None], 2)
    keep = mask.bool()[:, 1:-1].flatten(1)[:, None, None]
    p = signal[..., size:-size].masked_fill(~keep, -torch.inf).softmax(-1)
    return p.mean((1, 2)).unflatten(-1, (blocks - 2, size)).sum(-1)


def blockrank_aux_loss(scores: Tensor, labels: Tensor, answers: Tensor, mask: Tensor, temperature: float = 0.05) -> Tensor:
    """-log of the share of exp(r / temperature) that the right documents hold, mean over rows; answers (B, n): their numbers, -1 behind the last."""
    r = document_scores(scores, labels, mask) / temperature
    right = torch.zeros(len(r), r.shape[1] + 1, dtype=torch.bool, device=r.device)
    if int(answers.max()) >= r.shape[1] or not bool((answers >= 0).any(-1).all()):
        raise RegardError(f"answers up to {int(answers.max())}: expected numbers below {r.shape[1]} documents, at least one a row")
    right = right.scatter(1, torch.where(answers >= 0, answers, r.shape[1]), True)[:, :-1]
    return -(r.masked_fill(~right, -torch.inf).logsumexp(1) - r.logsumexp(1)).mean()


@dataclass
class Seen:
    """scores (B, N, n, M H): scaled logits of the last queries in the layer that was asked for."""

    scores: Tensor | None = None


class Enough(Exception):
    """The layer that was asked for has been read."""


@contextmanager
def ranking(model: nn.Module, mask: Tensor, layer: int | None = None, last: int = 16, stop: bool = False) -> Iterator[Seen]:
    """A transformers decoder that attends so inside the block: call it with input_ids (B, M H), position_ids of `blockrank_positions` and
    use_cache=False, without attention_mask. layer: whose scores of the last `last` queries are read, with gradients. stop: no further layer runs."""
    host: Any = model
    seen, count = Seen(), getattr(host, "get_base_model", lambda: host)().config.get_text_config().num_hidden_layers
    if layer is not None and not 0 <= layer < count:
        raise RegardError(f"layer={layer}: expected 0 to {count - 1}")

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, **options: Any) -> tuple[Tensor, None]:
        if padding is not None or options.get("dropout"):
            raise RegardError("expected calls without attention_mask, for the blocks' mask is known, and without dropout")
        scale = options.get("scaling")
        if module.layer_idx == layer:
            end = q[:, :, -min(last, mask.shape[2]) :] * (q.shape[-1] ** -0.5 if scale is None else scale)
            seen.scores = (end.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT).flatten(1, 2)
            if stop:
                raise Enough
        return blockrank_attention(q, k, v, mask, scale).transpose(1, 2), None

    with attending(model, "regard_blockrank", attention, any_positions=True), suppress(Enough):
        yield seen


@torch.no_grad()
def rank_by_attention(
    model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor, layer: int, last: int = 16, offset: int = 16384
) -> Tensor:
    """Document numbers (B, M - 2), best first, by what layer `layer` of a transformers decoder reads; later layers do not run.

    ids, labels (B, M H), mask (B, M, H).
    """
    with ranking(model, mask, layer, last, stop=True) as seen:
        model(input_ids=ids, position_ids=blockrank_positions(mask, offset), use_cache=False)
    assert seen.scores is not None
    return document_scores(seen.scores, labels, mask).argsort(dim=1, descending=True, stable=True)


__all__ = [
    "blockrank_attention",
    "blockrank_aux_loss",
    "blockrank_mask",
    "blockrank_positions",
    "document_scores",
    "rank_by_attention",
    "ranking",
]
