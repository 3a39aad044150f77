"""The measurements of a sweep of caches: quality against kept bytes, after the prompt and while tokens are generated."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache as once
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cache import Full, read_prompt
from ...cache.policy import Policy
from ...cache.session import Prompt
from ...errors import RegardError
from ...models.needles import fact, question
from ...tasks.text import Corpus
from .policies import policy, retrieval_gates
from .reader import Reader


@dataclass(frozen=True)
class CacheConfig:
    """length: tokens a prompt. windows: texts for bits per byte, and as many others that are continued by the model. steps: tokens after the prompt.
    needles: facts a depth, each asked for in the prompt and once more after it. depths: where the fact stands, 0 first."""

    length: int = 1024
    windows: int = 4
    steps: int = 128
    needles: int = 4
    depths: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 128 or min(self.windows, self.steps, self.needles) < 1:
            raise RegardError(
                f"--seq-len {self.length}, --windows {self.windows}, --steps {self.steps}, --needles {self.needles}: expected at least 128 tokens, and 1 of each"
            )
        if not self.depths or not all(0 <= d <= 1 for d in self.depths):
            raise RegardError(f"depths={self.depths}: expected shares between 0 and 1")


@dataclass(frozen=True)
class CachePoint:
    """One policy at one setting. kept: bytes of keys and values when the last token was read, over those of the full cache; prompt: after the
    prompt; held: as `kept`, with all that the policy notes. agreement: steps of the model's own greedy continuation at which its next token is still the
    most likely; divergence: mean KL from the full cache's distribution there, in bits; same: mean of the tokens before the first other one. retrieval, later: share of
    facts answered by depth, the question in the prompt, and after it."""

    name: str
    settings: str
    kept: float
    prompt: float
    held: float
    bits_per_byte: float
    agreement: float
    divergence: float
    same: float
    retrieval: dict[str, float]
    later: dict[str, float]

    @property
    def found(self) -> float:
        return sum(self.retrieval.values()) / len(self.retrieval)

    @property
    def found_later(self) -> float:
        return sum(self.later.values()) / len(self.later)


@dataclass
class CacheSweep:
    """What a sweep measured; the first point is the full cache."""

    config: CacheConfig
    model: str
    text: str
    points: list[CachePoint] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> CacheSweep:
        """A report.json; RegardError where it is none."""
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
            config = CacheConfig(**{**made["config"], "depths": tuple(made["config"]["depths"])})
            return cls(config, made["model"], made["text"], [CachePoint(**one) for one in made["points"]])
        except (OSError, ValueError, KeyError, TypeError) as why:
            raise RegardError(f"{path} is no report of a sweep of caches ({why}); expected one, or another --out") from None


@dataclass(frozen=True)
class Batch:
    """Prompts ids, mask (B, L), padded on the left, and what comes behind them, tokens (B, n), padded on the right."""

    ids: Tensor
    mask: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Texts:
    """long: first texts and then prompts that the model continues; size: bytes of the texts' continuations. short: prompts with facts; answers: of each its depth,
    whether the question comes later, and where its answer stands in tokens."""

    long: Batch
    size: int
    short: Batch
    answers: list[tuple[float, bool, slice]]


def padded(rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for at, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[at, place], mask[at, place] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def texts(model: Any, reader: Reader, text: Corpus, config: CacheConfig) -> Texts:
    begin = [] if reader.begin is None else [reader.begin]
    room, span = config.length - len(begin), config.length + config.steps
    ids = reader.tokens(bytes(text.valid.tolist())[: 16 * span * (2 * config.windows + 1)])
    if len(ids) < span:
        raise RegardError(f"the held-out text has {len(ids)} tokens; expected at least --seq-len and --steps, {span}")
    starts = torch.linspace(0, len(ids) - room - config.steps, 2 * config.windows).long().tolist()
    prompts = [begin + ids[s : s + room] for s in starts]
    coming = [ids[s + room : s + room + config.steps] for s in starts]
    size = sum(reader.size(row) for row in coming[: config.windows])
    given = torch.tensor(prompts[config.windows :])
    said = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=config.steps,
        min_new_tokens=config.steps,
        do_sample=False,
        pad_token_id=0,
    )[:, config.length :]
    tokens = torch.cat((torch.tensor(coming[: config.windows]), said))
    whole = torch.tensor(prompts)
    draw, rows, behind, answers = random.Random(config.seed), [], [], []
    for depth in config.depths:
        for _ in range(config.needles):
            one = fact(draw)
            stated, asked, full = (reader.tokens(x) for x in (one.text, question(one.name), question(one.name, one.value)))
            answer, free = full[len(asked) :], room - len(stated) - len(asked)
            start = draw.randrange(max(1, len(ids) - free))
            hay, at = ids[start : start + free], int(depth * free)
            context = [*begin, *hay[:at], *stated, *hay[at:]]
            for later in (False, True):
                rows.append(context if later else context + asked)
                behind.append(asked + answer if later else answer)
                answers.append((depth, later, slice(len(behind[-1]) - len(answer), len(behind[-1]))))
    return Texts(Batch(whole, torch.ones_like(whole), tokens), size, Batch(*padded(rows, True), padded(behind, False)[0]), answers)


def steps(model: Any, one: Policy, batch: Batch, prompt: Prompt, see: Callable[[int, Tensor], None]) -> tuple[Any, int]:
    """A policy that has read prompts reads what comes behind them, a token a call; see(step, logits (B, V)) of each. The cache, and its bytes
    after the prompts, which are read anew only by policies that read them in their own way."""
    mask = batch.mask
    with one(model) as session:
        if one.whole_prompts:
            session.recall(prompt)
            logits = prompt.logits
        else:
            logits = model(
                input_ids=batch.ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), logits_to_keep=1
            ).logits[:, -1]
        after = sum(layer.bytes for layer in session.cache.layers)
        for at in range(batch.tokens.shape[1]):
            see(at, logits.float())
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            places = mask.sum(1, keepdim=True) - 1
            token = batch.tokens[:, at : at + 1]
            logits = model(input_ids=token, attention_mask=mask, position_ids=places, past_key_values=session.cache).logits[:, -1]
        return session.cache, after


@dataclass
class Measure:
    """A model with what it is measured on; the full cache's numbers are the first."""

    model: Any
    ready: Texts
    config: CacheConfig
    truth: list[Tensor] = field(default_factory=list)  # of each step, log probabilities of the full cache
    sizes: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        self.long, self.short = (read_prompt(self.model, batch.ids, batch.mask) for batch in (self.ready.long, self.ready.short))

    def point(self, name: str, settings: str, one: Policy) -> CachePoint:
        w, ready, first = self.config.windows, self.ready, not self.truth
        nats, apart, same = 0.0, 0.0, []

        def see_long(at: int, logits: Tensor) -> None:
            nonlocal nats, apart
            log_p = logits.log_softmax(-1)
            token = ready.long.tokens[:, at]
            nats -= float(log_p[torch.arange(w), token[:w]].sum())
            if first:
                self.truth.append(log_p[w:])
            apart += float((self.truth[at].exp() * (self.truth[at] - log_p[w:])).sum())
            same.append(log_p[w:].argmax(-1) == token[w:])

        cache, after = steps(self.model, one, ready.long, self.long, see_long)
        size, held = sum(layer.bytes for layer in cache.layers), sum(layer.held for layer in cache.layers)
        if first:
            self.sizes = after, size
        guesses: list[Tensor] = []
        steps(self.model, one, ready.short, self.short, lambda at, logits: guesses.append(logits.argmax(-1)))
        right = torch.stack(guesses, 1) == ready.short.tokens
        found: dict[bool, dict[str, list[float]]] = {False: {}, True: {}}
        for row, (depth, later, where) in enumerate(ready.answers):
            found[later].setdefault(f"{depth:g}", []).append(float(right[row, where].all()))
        equal = torch.stack(same, 1)
        shares = [{depth: sum(x) / len(x) for depth, x in found[later].items()} for later in (False, True)]
        count = w * self.config.steps
        return CachePoint(
            name,
            settings,
            size / self.sizes[1],
            after / self.sizes[0],
            held / self.sizes[1],
            nats / math.log(2) / ready.size,
            float(equal.float().mean()),
            apart / math.log(2) / count,
            float(equal.long().cumprod(1).sum(1).float().mean()),
            *shares,
        )


@torch.no_grad()
def cache_sweep(
    model: Any,
    reader: Reader,
    text: Corpus,
    methods: dict[str, tuple[str, ...]],
    config: CacheConfig | None = None,
    name: str = "",
    done: CacheSweep | None = None,
) -> Iterator[CacheSweep]:
    """Measure the full cache, then every policy at every setting; yields the sweep after each point. done: an interrupted one that goes on."""
    config = config or CacheConfig()
    result = CacheSweep(config, name, text.name)
    if done is not None:
        if (done.config, done.model, done.text) != (config, name, text.name):
            raise RegardError(f"the report is of {done.model}, {done.text}, {done.config}; expected the same settings, or another --out")
        result.points = done.points
        yield result

    @once
    def gates() -> Tensor:
        return retrieval_gates(model, reader, bytes(text.train[: 16 * config.length].tolist()), min(config.length, 512))

    wanted = [(n, s) for n, settings in methods.items() for s in settings if n != "full"]
    made = {(n, s): policy(n, s, lambda: torch.zeros(1, 1)) for n, s in wanted}  # says at once what is wrong with a setting
    measure = Measure(model, texts(model, reader, text, config), config)
    whole = measure.point("full", "", Full())
    if not result.points:
        result.points.append(whole)
        yield result
    known = {(p.name, p.settings) for p in result.points}
    for key, one in made.items():
        if key not in known:
            one = policy(*key, gates) if key[0] == "duoattention" else one
            result.points.append(measure.point(*key, one))
            yield result
