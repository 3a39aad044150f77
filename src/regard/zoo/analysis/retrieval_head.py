"""Retrieval heads: those that copy a needle out of a long context, token by token (id 127; Wu et al., 2024).

At each step of greedy decoding a head scores 1 / (needle tokens) if one of its topk keys lies in the needle and holds the very token
that is being generated; summed over the answer, averaged over prompts that were answered (recall of the needle above one half).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.adapt.host import cache_argument
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.interpret.heads import ablated, head_counts
from regard.interpret.tables import Head, HeadResult, HeadTable, table_of
from regard.taps import Top, read


@dataclass(frozen=True)
class Needle:
    """ids (T,): haystack with the needle at [start, stop), then the question."""

    ids: Tensor
    start: int
    stop: int

    @property
    def needle(self) -> list[int]:
        return self.ids[self.start : self.stop].tolist()


def hidden(
    haystack: Tensor, needle: Tensor, question: Tensor, depth: float, boundary: Sequence[int] = (), copied: slice = slice(None)
) -> Needle:
    """Token streams (n,) put together: the needle behind the share `depth` of the haystack, moved back to stand behind a token of
    `boundary` (ends of sentences) where some are given. copied: the part of the needle that an answer repeats (all of it)."""
    if not 0 <= depth <= 1 or haystack.dim() != 1 or needle.dim() != 1 or not len(needle):
        raise RegardError(
            f"depth={depth}, haystack {tuple(haystack.shape)}, needle {tuple(needle.shape)}: expected 0 <= depth <= 1 and (n,)"
        )
    at = round(depth * len(haystack))
    while boundary and 0 < at < len(haystack) and int(haystack[at - 1]) not in boundary:
        at -= 1
    start, stop, _ = copied.indices(len(needle))
    return Needle(torch.cat((haystack[:at], needle, haystack[at:], question)), at + start, at + stop)


def find_needle(ids: Tensor, needle: Sequence[int], overlap: float = 0.9) -> tuple[int, int]:
    """Where a window as long as the needle first holds more than `overlap` of its different tokens: tokenizers may cut its ends anew."""
    wanted = set(needle)
    for at in range(len(ids)):
        if len(wanted & set(ids[at : at + len(needle)].tolist())) > overlap * len(wanted):
            return at, at + len(needle)
    raise RegardError(
        f"needle of {len(needle)} tokens is nowhere in ids ({len(ids)} tokens); expected a window with over {overlap:.0%} of it"
    )


def recall(needle: Sequence[int], answer: Sequence[int]) -> float:
    """ROUGE-1 recall: the share of the needle's tokens that the answer has, each as often as it has it."""
    both = Counter(needle) & Counter(answer)
    return sum(both.values()) / len(needle)


def hits(keys: Tensor, token: int, prompt: Needle) -> Tensor:
    """keys (..., k) to which heads look most -> (...) bool: whether one of them is in the needle and holds `token`."""
    inside = (keys >= prompt.start) & (keys < prompt.stop)
    ids = prompt.ids.to(keys.device)
    return (inside & (ids[keys.clamp(0, len(ids) - 1)] == token)).any(-1)


@torch.no_grad()
def answered(model: nn.Module, prompt: Needle, topk: int = 1, limit: int = 50, stop: Iterable[int] = ()) -> tuple[list[int], list[Tensor]]:
    """Greedy decoding with a cache: the answer, and each layer's scores (H,)."""
    ends, device = set(stop), next(model.parameters()).device
    if len(prompt.ids) < 2:
        raise RegardError(f"the prompt has {len(prompt.ids)} tokens; expected two or more")
    ids = prompt.ids[None].to(device)
    cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    token, name = ids[:, -1:], cache_argument(model)
    answer: list[int] = []
    scores = [torch.zeros(count, device=device, dtype=torch.float64) for count in head_counts(model)]
    with read(model, Top(topk)) as seen:
        for _ in range(limit):
            out = model(input_ids=token, use_cache=True, **{name: cache})
            cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            answer.append(int(token))
            for layer, (_, keys) in seen.items("top"):
                scores[layer] += hits(keys[0, :, 0], answer[-1], prompt).double() / (prompt.stop - prompt.start)
            if answer[-1] in ends:
                break
    return answer, scores


@dataclass(frozen=True)
class RetrievalHeads(HeadResult):
    """scores: mean over the answered prompts. active (layers, heads): share of them in which a head scored above 0.1. recalls: of all
    prompts; those above `least` count as answered."""

    scores: HeadTable
    active: HeadTable
    recalls: tuple[float, ...]
    least: float

    @property
    def answered(self) -> int:
        return sum(x > self.least for x in self.recalls)


@register("retrieval-head", kind="function")
def retrieval_scores(
    model: nn.Module,
    prompts: Iterable[Needle],
    *,
    topk: int = 1,
    limit: int = 50,
    stop: Iterable[int] = (),
    least: float = 0.5,
    active: float = 0.1,
) -> RetrievalHeads:
    """model: a transformers decoder. topk: keys looked at in each head and step. limit: tokens of an answer; it ends early at a token of
    `stop`. least: recall above which a prompt counts. active: the score above which a head counts as active in a prompt.

    One row of weights a head and step is looked at; no map is held. RegardError where the model answers no prompt.
    """
    if topk < 1 or limit < 1:
        raise RegardError(f"topk={topk}, limit={limit}; expected 1 or more")
    ends, kept, recalls = set(stop), [], []
    for prompt in prompts:
        answer, scores = answered(model, prompt, topk, limit, ends)
        recalls.append(recall(prompt.needle, answer))
        if recalls[-1] > least:
            kept.append(scores)
    if not kept:
        raise RegardError(
            f"the model answered none of {len(recalls)} prompts (best recall {max(recalls, default=0):.2f}); expected one or more"
        )
    layers = [torch.stack(rows) for rows in zip(*kept, strict=True)]
    mean = table_of((x.mean(0) for x in layers), "retrieval score")
    return RetrievalHeads(mean, table_of(((x > active).double().mean(0) for x in layers), "active"), tuple(recalls), least)


def needle_recall(
    model: nn.Module, prompts: Iterable[Needle], heads: Sequence[Head] = (), limit: int = 50, stop: Iterable[int] = ()
) -> float:
    """Mean recall of the needles, with these heads giving zeros."""
    found = []
    ends = set(stop)
    with ExitStack() as stack:
        if heads:
            stack.enter_context(ablated(model, heads))
        for prompt in prompts:
            found.append(recall(prompt.needle, answered(model, prompt, 1, limit, ends)[0]))
    return sum(found) / len(found)
