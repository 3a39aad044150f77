"""What a sweep of caches compares: the two controls, and policies by name at several budgets."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...cache import H2O, KIVI, TOVA, Ada, Full, KeyNorm, Pyramid, Random, SnapKV, StreamingLLM
from ...cache.policy import Policy
from ...errors import RegardError, nearest
from ...models.needles import fact, question
from ...nn.mixers import parsed
from ...zoo.analysis.retrieval_head import Needle, hidden, retrieval_scores
from ...zoo.systems.duoattention import DuoAttention
from ...zoo.systems.recycled_attention import RecycledAttention
from ...zoo.systems.vatp import VATP
from .reader import Reader

BUDGETS = ("budget=0.5", "budget=0.25", "budget=0.1")
CONTROLS: dict[str, tuple[str, ...]] = {"full": ("",), "random": BUDGETS}
DEFAULT_POLICIES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("streaming", "h2o", "snapkv", "tova", "keynorm", "pyramidkv", "adakv", "vatp"), BUDGETS),
    "duoattention": tuple(f"sparsity={s},sink=16,recent=64" for s in (0.5, 0.75, 0.9)),
    "recycled-attention": ("stride=10,k=256", "stride=10,k=64"),
    "kivi": ("bits=8", "bits=4", "bits=2"),
    "kivi+snapkv": ("bits=8,budget=0.5", "bits=4,budget=0.5", "bits=4,budget=0.25"),
}


def vatp(budget: float = 0.5, **options: Any) -> Policy:
    return VATP(heavy=budget / 2, recent=budget / 2, **options)


def packed_snap(budget: float = 0.5, window: int = 32, **options: Any) -> Policy:
    return KIVI(base=SnapKV(budget, window), **options)


def chance(budget: float = 0.5, seed: int = 0, decode: bool = True) -> Policy:
    return Random(budget, decode, torch.Generator().manual_seed(seed))


MADE: dict[str, Callable[..., Policy]] = {
    "full": Full,
    "random": chance,
    "streaming": StreamingLLM,
    "h2o": H2O,
    "snapkv": SnapKV,
    "tova": TOVA,
    "keynorm": KeyNorm,
    "pyramidkv": lambda budget=0.5, beta=20, **options: Pyramid(SnapKV(budget, **options), beta),
    "adakv": lambda budget=0.5, safeguard=0.2, **options: Ada(SnapKV(budget, **options), safeguard),
    "vatp": vatp,
    "duoattention": DuoAttention,
    "recycled-attention": RecycledAttention,
    "kivi": KIVI,
    "kivi+snapkv": packed_snap,
}


def chosen_policies(methods: list[str]) -> dict[str, tuple[str, ...]]:
    """Settings by name, the controls first; RegardError for what is not known. No method: all."""
    found = dict(CONTROLS) | ({} if methods else DEFAULT_POLICIES)
    given: dict[str, tuple[str, ...]] = {}
    for one in methods:
        name, colon, settings = one.partition(":")
        if name not in MADE:
            raise RegardError(f"policy {name!r} is not known; expected one of {', '.join(MADE)}.{nearest(name, list(MADE))}")
        usual = CONTROLS.get(name) or DEFAULT_POLICIES[name]
        given[name] = (*given.get(name, ()), *((settings,) if colon else usual))
    return found | given


def policy(name: str, settings: str, gates: Callable[[], Tensor]) -> Policy:
    """The policy of a name; gates: of the model's heads, for policies that need them."""
    _, options = parsed(f"{name}:{settings}")
    if name == "duoattention":
        options["gates"] = gates()
    try:
        return MADE[name](**options)
    except TypeError as why:
        raise RegardError(f"{name}:{settings}: {why}") from None


def retrieval_gates(model: Any, reader: Reader, text: bytes, length: int, prompts: int = 6, seed: int = 0) -> Tensor:
    """(layers, key heads), from 0 to 1: the rank of a key head by how much its query heads look at a hidden fact while they copy it, the most of a group.

    Stands in for DuoAttention's trained gates; RegardError where the model copies no fact.
    """
    draw, made = random.Random(seed), []
    begin = [] if reader.begin is None else [reader.begin]
    hay = reader.tokens(text[: 16 * length])[:length]
    for at in range(prompts):
        one = fact(draw)
        stated = begin_of(reader.tokens(one.text), reader.tokens(question(one.name)))
        value = reader.tokens(one.text)[stated:]
        where = slice(stated, stated + max(1, len(value) - 1))
        first, needle, asked = (torch.tensor(x) for x in (begin + hay, reader.tokens(one.text), reader.tokens(question(one.name))))
        made.append(hidden(first, needle, asked, (at + 0.5) / prompts, copied=where))
    scores = retrieval_scores(model, made, limit=max(limit(one) for one in made)).scores.scores
    config = model.config.get_text_config()
    most = scores.unflatten(1, (config.num_key_value_heads, -1)).amax(2)
    rank = most.flatten().argsort(stable=True).argsort()
    return (rank.double() / (len(rank) - 1)).view_as(most)


def begin_of(stated: list[int], asked: list[int]) -> int:
    """How many tokens a statement and its question share at their start."""
    return next((at for at, (a, b) in enumerate(zip(stated, asked, strict=False)) if a != b), min(len(stated), len(asked)))


def limit(prompt: Needle) -> int:
    return prompt.stop - prompt.start + 1
