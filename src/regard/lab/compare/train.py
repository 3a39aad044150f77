"""Training the small models: language on real text, and the two synthetic tasks, with the same seeds, tokens and steps for all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...nn import Attention, Decoder
from ...tasks import Corpus, copying, recall
from .config import Config, layer_of

VOCAB, PAIRS, RECALL_LENGTH = 64, (4, 8, 16), 64
Tick = Callable[[float], None]


def model_of(config: Config, spec: str, vocab: int = 256) -> Decoder:
    """The model of a mechanism: everything but the mechanism, and the seed, is the same for all."""
    torch.manual_seed(config.seed)
    mixers = [layer_of(spec, config.dim, config.heads, rope=True, context_len=config.seq_len) for _ in range(config.layers)]
    return Decoder(mixers, vocab=vocab, dim=config.dim, layers=config.layers, heads=config.heads, context_len=config.seq_len)


def optimizer_of(model: Decoder, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.01, foreach=True)


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over a tenth, then a cosine to a tenth."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def optimise(model: Decoder, loss_of: Callable[[int], Tensor], steps: int, rate: float, tick: Tick) -> list[float]:
    """Train; returns the loss of every step."""
    optimizer = optimizer_of(model, rate)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step, steps)
        optimizer.zero_grad()
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        tick(1)
    return losses


def language_loss(model: Decoder, tokens: Tensor) -> Tensor:
    """Mean bits per byte of next-byte prediction."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()) / math.log(2)


def train_language(config: Config, spec: str, corpus: Corpus, steps: int, tick: Tick) -> dict[str, Any]:
    """Train on text; measure validation bits per byte, loss at longer lengths, and sink mass."""
    model = model_of(config, spec)
    generator = torch.Generator().manual_seed(config.seed)
    start = time.perf_counter()
    losses = optimise(model, lambda _: language_loss(model, corpus.batch(config.batch, config.seq_len, generator)), steps, 3e-3, tick)
    seconds = time.perf_counter() - start
    model.eval()
    result: dict[str, Any] = {
        "steps": steps,
        "tokens": steps * config.batch * config.seq_len,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_bits": thinned(losses),
        "seconds": seconds,
        "valid_bits": {},
    }
    with torch.no_grad():
        stretches = corpus.held_out(4 * config.seq_len, 12)  # the same bytes at every length, cut finer for the shorter ones
        for times in (1, 2, 4):
            length = times * config.seq_len
            windows = torch.cat([stretches[:, at : at + length + 1] for at in range(0, 4 * config.seq_len, length)])
            pieces = windows.split(8)
            bits = [float(language_loss(model, piece)) * len(piece) for piece in pieces]
            result["valid_bits"][str(times)] = sum(bits) / len(windows)
            tick(0.5)
        result["sink_mass"] = sink_mass(model, corpus.held_out(config.seq_len, 4))
    return result


def thinned(values: list[float], points: int = 200) -> list[tuple[int, float]]:
    """(step, mean of the steps since the last point)."""
    width = max(1, len(values) // points)
    return [
        (min(at + width, len(values)), sum(values[at : at + width]) / len(values[at : at + width])) for at in range(0, len(values), width)
    ]


def sink_mass(model: Decoder, tokens: Tensor) -> float | None:
    """Share of absolute weight on the first token, mean over layers, heads and the later half of queries; None without rows of weights."""
    x, shares = model.embed(tokens[:, :-1]), []
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


def synthetic_batch(step: int, generator: torch.Generator, count: int = 32) -> tuple[Tensor, Tensor]:
    """Recall with growing numbers of pairs and copying, in turn."""
    turn = step % 4
    if turn == 3:
        return copying(count, RECALL_LENGTH, VOCAB, generator)
    return recall(count, RECALL_LENGTH, PAIRS[turn], VOCAB, generator)


def accuracy(model: Decoder, tokens: Tensor, labels: Tensor) -> float:
    asked = labels >= 0
    return float((model(tokens).argmax(-1) == labels)[asked].float().mean())


def train_synthetic(config: Config, spec: str, steps: int, tick: Tick) -> dict[str, Any]:
    """One model trained on recall and copying in turn; accuracy of each on fresh data."""
    model = model_of(config, spec, VOCAB)
    generator = torch.Generator().manual_seed(config.seed + 1)

    def loss_of(step: int) -> Tensor:
        tokens, labels = synthetic_batch(step, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())

    losses = optimise(model, loss_of, steps, 4e-3, tick)
    model.eval()
    fresh = torch.Generator().manual_seed(config.seed + 2)
    with torch.no_grad():
        pairs = {str(n): accuracy(model, *recall(128, RECALL_LENGTH, n, VOCAB, fresh)) for n in PAIRS}
        copied = accuracy(model, *copying(128, RECALL_LENGTH, VOCAB, fresh))
    return {"steps": steps, "loss": thinned(losses, 50), "recall": pairs, "copying": copied}


def seconds_per_step(config: Config, spec: str, corpus: Corpus) -> tuple[float, float]:
    """(language, synthetic) seconds of one training step, from a few."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for vocab in (256, VOCAB):
        model = model_of(config, spec, vocab)

        def loss_of(step: int, model: Decoder = model, vocab: int = vocab) -> Tensor:
            if vocab == 256:
                return language_loss(model, corpus.batch(config.batch, config.seq_len, generator))
            tokens, labels = synthetic_batch(step, generator)
            return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())

        optimise(model, loss_of, 2, 1e-3, lambda _: None)
        start = time.perf_counter()
        optimise(model, loss_of, 3, 1e-3, lambda _: None)
        found.append((time.perf_counter() - start) / 3)
    return found[0], found[1]
