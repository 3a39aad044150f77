"""Converted models: their layers' heads by hand, their streams, and the small text that short conversions learn from."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regard import models
from regard.adapt.conversion import Conversion
from regard.adapt.host import cache_argument
from regard.adapt.stages import bits_per_token
from regard.lab.checks.shared.byhand import rotary, split_heads
from regard.lab.checks.shared.comparing import F64
from regard.tasks.text import Corpus, python_text


class Heads(NamedTuple):
    """(B, H, L, D) each, a query head; k, v of key heads several times over."""

    q: Tensor
    k: Tensor
    v: Tensor
    turned_q: Tensor
    turned_k: Tensor


def heads_by_hand(layer: Any, x: Tensor, base: float = 10000.0) -> Heads:
    """What an attention layer of a Llama makes of x (B, L, dim), from its weights."""
    d, places = layer.head_dim, torch.arange(x.shape[1])
    q, k, v = (split_heads(x @ p.weight.T, p.weight.shape[0] // d) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    k, v = (torch.stack([y[:, h * y.shape[1] // q.shape[1]] for h in range(q.shape[1])], 1) for y in (k, v))
    return Heads(q, k, v, rotary(q, places, base), rotary(k, places, base))


def turned(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The model's cosines and sines for x (B, L, dim), in x's dtype."""
    angle = torch.arange(x.shape[1])[:, None].to(F64) * 10000.0 ** (
        -torch.arange(model.config.head_dim // 2, dtype=F64) * 2 / model.config.head_dim
    )
    angle = torch.cat((angle, angle), -1)[None]
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def student_of(conversion: Conversion, number: int = 0) -> Any:
    return list(conversion.students.values())[number]


def shaken(layer: nn.Module, spread: float = 0.5) -> Any:
    """The layer's parameters moved by random numbers."""
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(spread * torch.randn_like(p))
    return layer


@torch.no_grad()
def streamed(model: Any, ids: Tensor, cuts: tuple[int, ...] = (1, 5, 17)) -> tuple[Tensor, Any]:
    """(logits of ids read in pieces that end at `cuts` and then token by token, the cache)."""
    name, cache, outs = cache_argument(model), None, []
    edges = [0, *cuts, *range(cuts[-1] + 1, ids.shape[1] + 1)]
    for a, b in itertools.pairwise(edges):
        out = model(input_ids=ids[:, a:b], use_cache=True, **({} if cache is None else {name: cache}))
        cache = out[name]
        outs.append(out.logits)
    return torch.cat(outs, 1), cache


@functools.cache
def corpus() -> Corpus:
    return python_text(400_000)


def draws(batch: int, length: int) -> Callable[[torch.Generator], Tensor]:
    """Texts of the tiny model: a beginning and `length` bytes each."""

    def draw(generator: torch.Generator) -> Tensor:
        return begun(corpus().batch(batch, length - 1, generator))

    return draw


def begun(texts: Tensor) -> Tensor:
    return torch.cat((torch.full_like(texts[:, :1], models.BEGIN), texts), 1)


def tiny_bits(model: nn.Module, length: int = 192, count: int = 6) -> float:
    """Bits per byte of held-out text."""
    return bits_per_token(model, begun(corpus().held_out(length, count)))
