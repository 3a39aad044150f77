"""The measurements of a sweep: density, bits per byte, needles found, prefill time; all in one run, beside softmax."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...adapt import patch
from ...adapt.recorded import record
from ...engine import pairs_read
from ...engine.policy import Policy
from ...errors import RegardError
from ...models.needles import fact, question
from ...tasks.text import Corpus
from .methods import method
from .reader import Reader

CALIBRATION = 512  # tokens of a prompt that a policy may learn a model's layers from


@dataclass(frozen=True)
class Config:
    """length: tokens a prompt. windows: held-out texts for bits per byte. needles: prompts a depth. depths: where the fact stands, 0 first."""

    length: int = 2048
    windows: int = 4
    needles: int = 4
    depths: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 256:
            raise RegardError(f"--seq-len {self.length}: expected at least 256 tokens a prompt")
        if self.needles < 1:
            raise RegardError(f"--needles {self.needles}: expected at least one prompt a depth")
        if min(self.windows, self.repeats) < 1 or not self.depths or not all(0 <= d <= 1 for d in self.depths):
            raise RegardError(
                f"windows={self.windows}, repeats={self.repeats}, depths={self.depths}: expected positive counts, depths between 0 and 1"
            )


@dataclass(frozen=True)
class Point:
    """One method at one setting. density: pairs read over causal pairs. retrieval: by depth, share of answers wholly right.
    prefill: median time over that of softmax in the same run (the whole model)."""

    name: str
    settings: str
    density: float
    bits_per_byte: float
    retrieval: dict[float, float]
    prefill: float

    @property
    def found(self) -> float:
        return sum(self.retrieval.values()) / len(self.retrieval)


@dataclass
class Sweep:
    """What a sweep measured; the first point is softmax itself."""

    config: Config
    model: str
    text: str
    points: list[Point] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "points": [{**asdict(p), "retrieval": {str(d): r for d, r in p.retrieval.items()}} for p in self.points]}


@dataclass(frozen=True)
class Prompts:
    """Held-out windows with their sizes in bytes, and prompts with needles: (ids, answer tokens) by depth."""

    windows: list[tuple[Tensor, int]]
    needles: dict[float, list[tuple[Tensor, int]]]


def prompts(reader: Reader, text: Corpus, config: Config) -> Prompts:
    raw = bytes(text.valid.tolist())
    begin = [] if reader.begin is None else [reader.begin]
    room = config.length - len(begin)
    ids = reader.tokens(raw[: 64 * config.length * (config.windows + config.needles)])
    if len(ids) < config.length:
        raise RegardError(f"the held-out text has {len(ids)} tokens; expected at least --seq-len {config.length}")
    starts = torch.linspace(0, len(ids) - room, config.windows).long().tolist()
    windows = [(torch.tensor([[*begin, *ids[s : s + room]]]), reader.size(ids[s : s + room])) for s in starts]
    draw, needles = random.Random(config.seed), {}
    for depth in config.depths:
        made = []
        for _ in range(config.needles):
            one = fact(draw)
            stated, asked = reader.tokens(one.text), reader.tokens(question(one.name, one.value))
            answer = len(asked) - len(reader.tokens(question(one.name)))
            free = room - len(stated) - len(asked)
            start = draw.randrange(max(1, len(ids) - free))
            hay, at = ids[start : start + free], int(depth * free)
            made.append((torch.tensor([[*begin, *hay[:at], *stated, *hay[at:], *asked]]), answer))
        needles[depth] = made
    return Prompts(windows, needles)


def bits_per_byte(model: Any, windows: list[tuple[Tensor, int]]) -> float:
    nats = size = 0.0
    for ids, count in windows:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        nats += float(F.cross_entropy(logits.float(), ids[0, 1:], reduction="sum"))
        size += count
    return nats / math.log(2) / size


def retrieval(model: Any, made: list[tuple[Tensor, int]]) -> float:
    """Share of prompts whose answer is the most likely continuation, token by token."""
    right = 0
    for ids, answer in made:
        guess = model(input_ids=ids, use_cache=False, logits_to_keep=answer + 1).logits[0, -answer - 1 : -1].argmax(-1)
        right += bool((guess == ids[0, -answer:]).all())
    return right / len(made)


def seconds(run: Callable[[], Any], repeats: int) -> float:
    run()
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


@torch.no_grad()
def sweep(
    model: Any, reader: Reader, text: Corpus, methods: dict[str, tuple[str, ...]], config: Config | None = None, name: str = ""
) -> Iterator[Sweep]:
    """Measure softmax, then every method at every setting, in the prefill of all layers; yields the sweep after each point."""
    config = config or Config()
    made = {(n, s): method(n, s) for n, settings in methods.items() for s in settings}  # says at once what is wrong with a name
    ready = prompts(reader, text, config)
    first = ready.windows[0][0]
    result = Sweep(config, name, text.name)
    for (label, settings), mechanism in {("softmax", ""): None, **made}.items():
        if isinstance(mechanism, Policy):
            mechanism.calibrate(record(model, first[:, :CALIBRATION]))
        with patched(model, mechanism or "softmax"), pairs_read() as pairs:
            model(input_ids=first, use_cache=False)
        layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
        density = pairs.read / (layers * heads * first.shape[1] * (first.shape[1] + 1) / 2)
        base = seconds(lambda: model(input_ids=first, use_cache=False), config.repeats)
        with patched(model, mechanism):
            taken = seconds(lambda: model(input_ids=first, use_cache=False), config.repeats)
            bits = bits_per_byte(model, ready.windows)
            found = {depth: retrieval(model, prompts_) for depth, prompts_ in ready.needles.items()}
        result.points.append(Point(label, settings, density, bits, found, taken / base))
        yield result


def patched(model: Any, mechanism: Any) -> AbstractContextManager[Any]:
    return nullcontext() if mechanism is None else patch(model, mechanism, when="prefill")
