"""Seven small stand-ins for the tasks of long-sequence benchmarks, drawn from a generator, with the measures of the tasks they stand for.

speech (text to speech), summary (copy what is marked), forecast (long time series), points (completion of point sets), language and masked
language (the text that ships with Python), resolution (images). What a net reads and gives: `Task`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RegardError
from .images import bumps
from .sequence_measures import chamfer, f_score, mel_cepstral_distortion, psnr, rouge, spectral_distortion, ssim
from .synthetic import IGNORE
from .text import Corpus, python_text

Draw = Callable[[int, torch.Generator], "Batch"]
Measure = Callable[[Tensor, "Batch"], float]
WORDS, FRAMES, MASKED = 16, 20, 256  # words of speech and summaries; channels of a frame; the id of a hidden byte
MARKS = 4  # of summaries


@dataclass(frozen=True)
class Batch:
    """source and target: what a net reads, ids (B, L) or features (B, L, width), or None. answer: what it must give: ids (B, L), -100 where nothing is
    asked, or features (B, L, width)."""

    source: Tensor | None
    target: Tensor | None
    answer: Tensor


@dataclass(frozen=True)
class Task:
    """source, target, outputs: sizes for the net, a vocabulary's, or minus the width of features; 0: none. measures: name -> (measure of (output,
    batch), whether higher is better). loss: of the same. own: whether rows of targets see one another."""

    draw: Draw
    source: int
    target: int
    outputs: int
    loss: Callable[[Tensor, Batch], Tensor]
    measures: dict[str, tuple[Measure, bool]]
    own: bool = True


@functools.lru_cache(1)
def corpus() -> Corpus:
    return python_text(400_000)


@functools.lru_cache(1)
def voices() -> Tensor:
    """A smooth spectrum (FRAMES,) for each word, and in the last column how many frames it lasts: 1 to 3."""
    generator = torch.Generator().manual_seed(1)
    x = F.avg_pool1d(torch.randn(WORDS, 1, FRAMES + 4, generator=generator), 5, 1)[:, 0] * 2
    return torch.cat((x, 1 + torch.randint(3, (WORDS, 1), generator=generator)), 1)


def spoken(words: Tensor, frames: int, fade: float = 0.7) -> tuple[Tensor, Tensor]:
    """(the word of each frame (B, frames), spectra (B, frames, FRAMES)): f_t = fade f_{t-1} + (1 - fade) voice of the word, from 0."""
    table = voices()
    at = torch.stack([torch.repeat_interleave(row, table[row, -1].long())[:frames] for row in words])
    clean, out = table[at, :-1], []
    frame = torch.zeros_like(clean[:, 0])
    for t in range(frames):
        frame = fade * frame + (1 - fade) * clean[:, t]
        out.append(frame)
    return at, torch.stack(out, 1)


def shifted(x: Tensor, first: float = 0) -> Tensor:
    """What a decoder reads: answers (B, L, ...) one place later, `first` before them."""
    return torch.cat((torch.full_like(x[:, :1], first), x[:, :-1]), 1)


def speech(count: int, generator: torch.Generator, length: int, told: bool) -> Batch:
    """Words, each repeated to the frames it lasts as behind a predictor of durations, to spectra. told: frames one by one, from those before."""
    words, frames = spoken(torch.randint(WORDS, (count, length), generator=generator), length)
    return Batch(words, shifted(frames) if told else None, frames)


def summary(count: int, generator: torch.Generator, length: int, marks: int = MARKS) -> Batch:
    """The words with the marks 1 to `marks`, in the order of the marks, one word each: id mark * WORDS + word, mark 0 for what is left out."""
    if length < marks:
        raise RegardError(f"length={length}; expected {marks} or more for {marks} marked words")
    answer = torch.randint(WORDS, (count, marks), generator=generator)
    places = torch.rand(count, length, generator=generator).argsort(1)[:, :marks]
    text = torch.randint(WORDS, (count, length), generator=generator)
    text = text.scatter(1, places, answer + WORDS * torch.arange(1, marks + 1))
    return Batch(text, shifted(answer), answer)


def forecast(count: int, generator: torch.Generator, length: int, known: float = 2 / 3) -> Batch:
    """A noisy series with two periods and a trend, 2 channels: the first share is read, the rest is told from the time of its rows alone."""
    at = torch.arange(length, dtype=torch.float32)
    phase, size = (torch.rand(count, 2, 2, 1, generator=generator) for _ in range(2))
    period = torch.tensor([8.0, 24.0])[:, None]
    x = ((0.5 + size) * torch.sin(2 * math.pi * (at / period + phase))).sum(2)
    x = x + torch.randn(count, 2, 1, generator=generator) * at / length + 0.1 * torch.randn(count, 2, length, generator=generator)
    cut = round(length * known)
    clock = torch.cat([f(2 * math.pi * at / p) for f in (torch.sin, torch.cos) for p in period]).view(4, length).T.expand(count, -1, -1)
    return Batch(torch.cat((x.mT[:, :cut], clock[:, :cut]), -1), clock[:, cut:], x.mT[:, cut:])


@functools.lru_cache(4)
def sphere(count: int) -> Tensor:
    """(count, 3) evenly spread on the unit sphere: a spiral by the golden angle."""
    n = torch.arange(count, dtype=torch.float32)
    height, angle = 1 - (2 * n + 1) / count, n * math.pi * (3 - math.sqrt(5.0))
    radius = (1 - height.square()).sqrt()
    return torch.stack((radius * angle.cos(), radius * angle.sin(), height), -1)


def points(count: int, generator: torch.Generator, length: int) -> Batch:
    """The half of an ellipsoid's points that one side sees (length / 2), and all of them (length), from a spread of queries."""
    axes = 0.3 + torch.rand(count, 1, 3, generator=generator)
    way = F.normalize(torch.randn(count, length, 3, generator=generator), dim=-1)
    whole, view = way * axes, F.normalize(torch.randn(count, 3, 1, generator=generator), dim=1)
    near = (whole @ view)[..., 0].argsort(1, descending=True)[:, : length // 2]
    return Batch(whole.gather(1, near[..., None].expand(-1, -1, 3)), sphere(length).expand(count, -1, -1), whole)


def language(count: int, generator: torch.Generator, length: int) -> Batch:
    """Bytes, each told from those before it."""
    window = corpus().batch(count, length, generator)
    return Batch(None, window[:, :-1], window[:, 1:])


def masked_language(count: int, generator: torch.Generator, length: int, share: float = 0.15) -> Batch:
    """Bytes of which a share is hidden, at least one a row: those are asked."""
    text = corpus().batch(count, length, generator)[:, :-1]
    hidden = torch.rand(text.shape, generator=generator).argsort(1) < max(1, round(share * length))
    return Batch(text.masked_fill(hidden, MASKED), None, text.masked_fill(~hidden, IGNORE))


def resolution(count: int, generator: torch.Generator, length: int, factor: int = 2) -> Batch:
    """Pictures in [0, 1] of a bump and an edge from their means over factor x factor pixels, repeated; pixels are tokens, row by row."""
    side = math.isqrt(length) // factor * factor
    if side < 7:
        raise RegardError(f"length={length}; expected 64 or more, the pixels of a picture")
    at = side * torch.rand(count, 2, generator=generator)
    axis = torch.arange(side) - side / 2
    turn = 2 * math.pi * torch.rand(count, 1, 1, generator=generator)
    edge = torch.sigmoid(2 * (axis[:, None] * turn.sin() + axis * turn.cos()))
    picture = (0.6 * bumps(at, side, side / 8) + 0.4 * edge)[:, None]
    low = F.interpolate(F.avg_pool2d(picture, factor), scale_factor=factor)
    return Batch(low.flatten(1)[..., None], None, picture.flatten(1)[..., None])


def squared(out: Tensor, batch: Batch) -> Tensor:
    return F.mse_loss(out, batch.answer)


def entropy(out: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(out.flatten(0, 1), batch.answer.flatten(), ignore_index=IGNORE)


def perplexity(out: Tensor, batch: Batch) -> float:
    return math.exp(float(entropy(out, batch)))


def common_words(out: Tensor, answer: Tensor, kind: str) -> float:
    return rouge(out.argmax(-1), answer, kind)


def as_pictures(x: Tensor) -> Tensor:
    return x[..., 0].unflatten(1, (math.isqrt(x.shape[1]), -1)).clamp(0, 1)


def tasks(length: int = 64) -> dict[tuple[str, str], Task]:
    """(task, pattern) -> Task: the eleven places of the seven tasks among the patterns. length: of the long side, in tokens, 64 or more; a picture
    is the largest even square within."""
    if length < 64 or length % 2:
        raise RegardError(f"length={length}; expected an even number, 64 or more")

    def drawn(make: Callable[..., Batch], *more: bool) -> Draw:
        return lambda count, generator: make(count, generator, length, *more)

    def both(measure: Callable[[Tensor, Tensor], float]) -> Measure:
        return lambda out, batch: measure(out, batch.answer)

    told: dict[str, tuple[Measure, bool]] = {"MCD": (both(mel_cepstral_distortion), False), "MSD": (both(spectral_distortion), False)}
    rouges: dict[str, tuple[Measure, bool]] = {
        f"ROUGE-{kind}": (both(functools.partial(common_words, kind=kind)), True) for kind in ("1", "2", "L")
    }
    surprise: dict[str, tuple[Measure, bool]] = {"perplexity": (perplexity, False)}
    found: dict[tuple[str, str], Task] = {
        ("speech", "noncausal self"): Task(drawn(speech, False), WORDS, 0, FRAMES, squared, told),
        ("resolution", "noncausal self"): Task(
            drawn(resolution),
            -1,
            0,
            1,
            squared,
            {
                "PSNR": (lambda out, batch: psnr(as_pictures(out), as_pictures(batch.answer)), True),
                "SSIM": (lambda out, batch: ssim(as_pictures(out), as_pictures(batch.answer)), True),
            },
        ),
        ("masked language", "noncausal self"): Task(drawn(masked_language), MASKED + 1, 0, 256, entropy, surprise),
        ("language", "causal self"): Task(drawn(language), 0, 256, 256, entropy, surprise),
        ("points", "noncausal cross"): Task(
            drawn(points),
            -3,
            -3,
            3,
            lambda out, batch: chamfer(out, batch.answer, 1),
            {
                "CD-l1": (lambda out, batch: float(chamfer(out, batch.answer, 1)), False),
                "CD-l2": (lambda out, batch: float(chamfer(out, batch.answer, 2)), False),
                "F-score": (both(f_score), True),
            },
            own=False,
        ),
        ("forecast", "noncausal cross"): Task(
            drawn(forecast),
            -6,
            -4,
            2,
            squared,
            {"MSE": (both(lambda a, b: float(F.mse_loss(a, b))), False), "MAE": (both(lambda a, b: float(F.l1_loss(a, b))), False)},
            own=False,
        ),
    }
    for pattern in ("causal self", "causal cross"):
        found["speech", pattern] = Task(drawn(speech, True), WORDS, -FRAMES, FRAMES, squared, told)
    for pattern in ("noncausal self", "causal self", "causal cross"):
        found["summary", pattern] = Task(drawn(summary), (1 + MARKS) * WORDS, WORDS, WORDS, entropy, rouges)
    return found
