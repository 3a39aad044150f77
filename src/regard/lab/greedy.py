"""Whether drafting strategies say what plain greedy decoding says, on real prompts, token for token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..generate import DraftModel, Plain, PromptLookup, Strategy, generate
from ..tasks.text import Corpus
from ..zoo.systems.hidden_transfer import HiddenTransfer
from ..zoo.systems.longspec import LongSpec
from ..zoo.systems.medusa import Medusa
from ..zoo.systems.token_recycling import TokenRecycling
from .sweep.reader import Reader


@dataclass
class Agreement:
    """Of one strategy. prompts: how many; gaps: of those whose continuation differs, by how much the plain model preferred its own token to the strategy's at
    the first that does (logits; a rounding of float32 where it is next to nothing); per_pass: tokens a pass of the model."""

    prompts: int
    gaps: list[float]
    per_pass: float

    @property
    def equal(self) -> int:
        return self.prompts - len(self.gaps)


def noisy(model: Any, noise: float = 0.01) -> Any:
    """A copy whose weights are shaken, as a draft that often guesses right."""
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for p in other.parameters():
        p.data.add_(noise * p.data.std() * torch.randn(p.shape, generator=draw)) if p.dim() > 1 else None
    return other


def strategies(model: Any) -> dict[str, Callable[[], Strategy]]:
    """All, with parts that no one has trained, which guess badly."""
    torch.manual_seed(0)
    draft, medusa, maps = noisy(model), Medusa(model, 2), HiddenTransfer(model, [1, 2])
    long = LongSpec(model, 32, (3, 4))
    return {
        "plain": Plain,
        "prompt-lookup": PromptLookup,
        "draft model": lambda: DraftModel(draft, 3),
        "token-recycling": TokenRecycling,
        "medusa": lambda: medusa,
        "hidden-transfer": lambda: maps,
        "longspec": lambda: long,
    }


def real_prompts(reader: Reader, text: Corpus, count: int, length: int) -> Tensor:
    """(count, length), spread over the held-out text."""
    begin = [] if reader.begin is None else [reader.begin]
    span = 12 * length
    starts = torch.linspace(0, len(text.valid) - span, count).long().tolist()
    return torch.tensor([(begin + reader.tokens(bytes(text.valid[at : at + span].tolist())))[:length] for at in starts])


@torch.no_grad()
def agreements(
    model: Any, ids: Tensor, tokens: int, wanted: dict[str, Callable[[], Strategy]] | None = None
) -> Iterator[tuple[str, Agreement]]:
    """Each strategy on prompts ids (B, L), against `model.generate(do_sample=False)`."""
    truth = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    for name, make in (wanted or strategies(model)).items():
        out = generate(model, ids, make(), max_new_tokens=tokens, ends=())
        gaps = []
        for own, other in zip(truth, out.tokens, strict=True):
            stop = next((at for at in range(ids.shape[1], len(own)) if int(own[at]) == model.config.eos_token_id), len(own) - 1) + 1
            differ = (own[:stop] != other[:stop]).nonzero()
            if len(differ):
                first = int(differ[0])
                logits = model(input_ids=own[None, :first], use_cache=False, logits_to_keep=1).logits[0, -1]
                gaps.append(float(logits[own[first]] - logits[other[first]]))
        yield name, Agreement(len(ids), gaps, out.tokens_per_step)
