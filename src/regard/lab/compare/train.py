"""Training the small models: language on real text, and two synthetic tasks, with the same seeds, tokens and steps for all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import Attention, Decoder, GatedConv
from ...tasks import Corpus, copying, recall
from .config import Config, layer_of
from .optimizer import Muon

# Found by benchmarks/recipe.py: what learns most in ten seconds of one core.
MATRIX_RATE, OTHER_RATE = 0.02, 0.01
VOCAB, LENGTH, COUNT = 64, 64, 16  # of the synthetic tasks: symbols, tokens, sequences a step
PAIRS = (4, 8, 16)
TASKS = ("language", "recall", "copying")
WARM = 2  # steps before the clock is read


def language_model(config: Config, spec: str, seed: int, vocab: int = 256, length: int | None = None) -> Decoder:
    """The model of a mechanism in every layer: everything but the mechanism, and the seed, is the same for all."""
    torch.manual_seed(seed)
    length = length or config.seq_len
    mixers = [layer_of(spec, config.dim, config.heads, rope=True, context_len=length) for _ in range(config.layers)]
    return Decoder(mixers, vocab=vocab, dim=config.dim, layers=config.layers, heads=config.heads, context_len=length)


def recall_model(config: Config, spec: str, seed: int) -> Decoder:
    """A short gated convolution, which brings each value to its key, and one layer that must remember the pairs."""
    torch.manual_seed(seed)
    layers = [GatedConv(config.dim), layer_of(spec, config.dim, config.heads, context_len=LENGTH)]
    return Decoder(layers, vocab=VOCAB, dim=config.dim, layers=2, heads=config.heads, context_len=LENGTH)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the model, AdamW for embeddings, norms and whatever is no matrix."""
    inside = {id(p) for name, p in model.named_parameters() if p.dim() == 2 and not name.startswith("embed")}
    matrices = [p for p in model.parameters() if id(p) in inside]
    others = [p for p in model.parameters() if id(p) not in inside]
    found: list[torch.optim.Optimizer] = [Muon(matrices, MATRIX_RATE)] if matrices else []
    return [*found, torch.optim.AdamW(others, OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)]


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over 20 steps (a fifth of a short run), level to two fifths, then down in a line."""
    warm = max(1, min(20, steps // 5))
    return min(1.0, (step + 1) / warm, max(0.05, (steps - step) / max(1.0, 0.6 * steps)))


def optimise(model: nn.Module, loss_of: Callable[[int], Tensor], steps: int) -> list[float]:
    """Train; returns the loss of every step."""
    chosen = optimizers(model)
    rates = [[group["lr"] for group in one.param_groups] for one in chosen]
    losses = []
    for step in range(steps):
        for one, own in zip(chosen, rates, strict=True):
            for group, rate in zip(one.param_groups, own, strict=True):
                group["lr"] = rate * schedule(step, steps)
            one.zero_grad()
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one in chosen:
            one.step()
        losses.append(float(loss.detach()))
    return losses


def language_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean bits per byte of next-byte prediction."""
    tokens = tokens.to(device_of(model))
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()) / math.log(2)


def asked_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy where something is asked."""
    tokens, labels = tokens.to(device_of(model)), labels.to(device_of(model))
    asked = labels >= 0
    return F.cross_entropy(model(tokens)[asked], labels[asked])


def train(
    config: Config, task: str, spec: str, seed: int, steps: int, corpus: Corpus, shared: Callable[[Lesson], Lesson] = lambda own: own
) -> dict[str, Any]:
    """One model on one task ("language", "recall" or "copying") with one seed: its measures and the curve of its loss. shared: how a
    lesson is shared among processes."""
    start = time.perf_counter()
    own = lesson(config, task, spec, seed, corpus)
    model: Any = own.model
    lessons = shared(own)
    losses = optimise(model, lessons, steps)
    lessons.gather(model)
    model.eval()
    with torch.no_grad():
        found = {"language": language, "recall": recalled, "copying": copied}[task](config, model, seed, corpus)
    kept = {"steps": steps, "loss": thinned(losses), "seconds": time.perf_counter() - start}
    return {**found, **kept, "parameters": sum(p.numel() for p in model.parameters())}


@dataclass
class Lesson:
    """An untrained model of a task, the tensors of each step, and their loss. gather(model): makes a model that processes share whole in each
    of them, when it is trained."""

    model: nn.Module
    batch: Callable[[int], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    gather: Callable[[nn.Module], None] = lambda model: None

    def __call__(self, step: int) -> Tensor:
        return self.loss(self.model, *self.batch(step))


def lesson(config: Config, task: str, spec: str, seed: int, corpus: Corpus) -> Lesson:
    """What is the same for all mechanisms: the seed, the data, their order."""
    generator = torch.Generator().manual_seed(seed)
    if task == "language":
        return Lesson(language_model(config, spec, seed), lambda _: (corpus.batch(config.batch, config.seq_len, generator),), language_loss)
    if task == "copying":
        return Lesson(language_model(config, spec, seed, VOCAB, LENGTH), lambda _: copying(COUNT, LENGTH, VOCAB, generator), asked_loss)
    return Lesson(
        recall_model(config, spec, seed), lambda step: recall(COUNT, LENGTH, PAIRS[step % len(PAIRS)], VOCAB, generator), asked_loss
    )


def language(config: Config, model: Decoder, seed: int, corpus: Corpus) -> dict[str, Any]:
    """Held-out bits per byte at one, two and four times the training length, over the same bytes; and sink mass."""
    stretches, bits = corpus.held_out(4 * config.seq_len, 24), {}
    for times in (1, 2, 4):
        length = times * config.seq_len
        windows = torch.cat([stretches[:, at : at + length + 1] for at in range(0, 4 * config.seq_len, length)])
        pieces = windows.split(16)
        bits[str(times)] = sum(float(language_loss(model, piece)) * len(piece) for piece in pieces) / len(windows)
    return {"bits": bits, "sink_mass": sink_mass(model, corpus.held_out(config.seq_len, 4))}


def recalled(config: Config, model: Decoder, seed: int, corpus: Corpus) -> dict[str, Any]:
    """Accuracy by number of pairs, on fresh sequences."""
    fresh = torch.Generator().manual_seed(seed + 2**20)
    return {"accuracy": {str(n): accuracy(model, *recall(256, LENGTH, n, VOCAB, fresh)) for n in PAIRS}}


def copied(config: Config, model: Decoder, seed: int, corpus: Corpus) -> dict[str, Any]:
    """Accuracy on fresh sequences."""
    fresh = torch.Generator().manual_seed(seed + 2**20)
    return {"accuracy": {str(LENGTH // 2): accuracy(model, *copying(256, LENGTH, VOCAB, fresh))}}


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def thinned(values: list[float], points: int = 100) -> list[tuple[int, float]]:
    """(step, mean of the steps since the last point)."""
    width = max(1, len(values) // points)
    return [
        (min(at + width, len(values)), sum(values[at : at + width]) / len(values[at : at + width])) for at in range(0, len(values), width)
    ]


def sink_mass(model: Decoder, tokens: Tensor) -> float | None:
    """Share of absolute weight on the first token, mean over layers, heads and the later half of queries; None without rows of weights."""
    x, shares = model.embed(tokens[:, :-1].to(device_of(model))), []
    for block in model.blocks:
        mixer = block.mixer
        w = mixer.weights(block.norm1(x)) if isinstance(mixer, Attention) else None  # type: ignore[operator]
        if w is None:
            return None
        size = w.abs()[:, :, w.shape[-2] // 2 :]
        total = size.sum(-1)
        shares.append(torch.where(total > 0, size[..., 0] / total.clamp_min(1e-30), 0.0).mean())
        x = block(x)
    return float(torch.stack(shares).mean())


def accuracy(model: nn.Module, tokens: Tensor, labels: Tensor) -> float:
    """Share of asked places whose label is the model's first choice."""
    tokens, labels = tokens.to(device_of(model)), labels.to(device_of(model))
    asked = labels >= 0
    return float((model(tokens).argmax(-1) == labels)[asked].float().mean())


def seconds_per_step(config: Config, task: str, spec: str, corpus: Corpus, shared: Callable[[Lesson], Lesson] = lambda own: own) -> float:
    """Seconds of one training step: the median of a few, after those in which everything is met for the first time."""
    own = lesson(config, task, spec, config.seed, corpus)
    loss_of = shared(own)
    begun = []

    def timed(step: int) -> Tensor:
        begun.append(time.perf_counter())
        return loss_of(step)

    optimise(own.model, timed, WARM + 5)
    begun.append(time.perf_counter())
    return statistics.median(b - a for a, b in pairwise(begun[WARM:]))
