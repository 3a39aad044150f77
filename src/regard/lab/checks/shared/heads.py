"""Small models and data for checks that look at heads."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.nn.attention import Attention
from regard.nn.decoder import Decoder
from regard.tasks.training import fit


def mixers(model: Decoder) -> list[Attention]:
    """The attention layers of regard's decoder."""
    return [cast(Attention, block.mixer) for block in model.blocks]


def source(count: int, length: int) -> Tensor:
    """ids (count, length + 1) of Python source that every installation has, for the byte-level model."""
    raw = Path(ast.__file__).read_bytes()[3000:]
    return torch.tensor([[0, *raw[n * length : (n + 1) * length]] for n in range(count)])


def next_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def next_accuracy(model: nn.Module, ids: Tensor) -> float:
    return float((model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).double().mean())


def reversal(count: int, generator: torch.Generator, vocab: int = 10, length: int = 6) -> Tensor:
    """(count, 2 length + 1): tokens, a mark, and the tokens again from behind."""
    x = torch.randint(1, vocab, (count, length), generator=generator)
    return torch.cat((x, torch.zeros(count, 1, dtype=torch.long), x.flip(1)), 1)


def reversal_loss(model: Decoder, ids: Tensor) -> Tensor:
    half = ids.shape[1] // 2
    return F.cross_entropy(model(ids[:, :-1])[:, half:].flatten(0, 1), ids[:, half + 1 :].flatten())


@torch.no_grad()
def reversal_accuracy(model: Decoder, ids: Tensor) -> float:
    half = ids.shape[1] // 2
    return float((model(ids[:, :-1])[:, half:].argmax(-1) == ids[:, half + 1 :]).double().mean())


def reverser(steps: int, seed: int = 0, before: Callable[[Decoder], Callable[[int], None]] | None = None, **options: int) -> Decoder:
    """A decoder of 2 layers and 8 heads trained to reverse; before(model) gives what is called before each step."""
    torch.manual_seed(seed)
    model = Decoder(vocab=10, **{"dim": 64, "layers": 2, "heads": 8, "hidden": 64, **options})
    watch = None if before is None else before(model)
    fit(model, lambda generator: reversal(32, generator), lambda ids: reversal_loss(model, ids), steps, lr=3e-3, seed=seed, watch=watch)
    return model
