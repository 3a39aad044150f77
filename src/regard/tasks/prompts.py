"""Prompts that circuits are studied on, over a vocabulary of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RegardError


@dataclass(frozen=True)
class Prompts:
    """clean, corrupt (B, L): ids token for token; answers (B, 2): the right token and the wrong one."""

    clean: Tensor
    corrupt: Tensor
    answers: Tensor


def different(count: int, of: int, known: int, generator: torch.Generator) -> Tensor:
    """(count, of) numbers below `known`, different in each row."""
    return torch.rand(count, known, generator=generator).argsort(-1)[:, :of]


BEGIN, AND, WENT, GAVE, TO, THE, ASK, IS = range(8)
WORDS = 8  # what stands below it are words of the templates


def indirect_object(count: int, names: int, generator: torch.Generator) -> Prompts:
    """ "A and B went, B gave to" -> A: ids from WORDS on are names. The order of the first two is drawn. Corrupt: a third name gives, so that
    nothing is twice. The wrong answer is B."""
    if names < 3:
        raise RegardError(f"names={names}; expected 3 or more")
    io, s, third = (WORDS + x for x in different(count, 3, names, generator).unbind(-1))
    flip = torch.rand(count, generator=generator) < 0.5
    first, second = torch.where(flip, s, io), torch.where(flip, io, s)

    def text(giver: Tensor) -> Tensor:
        words = [torch.full((count,), word) for word in (BEGIN, AND, WENT, GAVE, TO)]
        return torch.stack((words[0], first, words[1], second, words[2], giver, words[3], words[4]), 1)

    return Prompts(text(s), text(third), torch.stack((io, s), 1))


def colored_objects(count: int, colors: int, objects: int, generator: torch.Generator) -> Prompts:
    """ "the c1 o1, the c2 o2, the c3 o3; what color is the o?" -> its color: ids from WORDS on are colors, then objects. Corrupt: another of
    the three objects is asked for, whose color is the wrong answer."""
    if colors < 3 or objects < 3:
        raise RegardError(f"colors={colors}, objects={objects}; expected 3 or more of each")
    c = WORDS + different(count, 3, colors, generator)
    o = WORDS + colors + different(count, 3, objects, generator)
    asked = different(count, 2, 3, generator)
    the, begin, ask, is_ = (torch.full((count,), word) for word in (THE, BEGIN, ASK, IS))

    def text(which: Tensor) -> Tensor:
        parts = [begin]
        for item in range(3):
            parts += [the, c[:, item], o[:, item]]
        return torch.stack((*parts, ask, o.gather(1, which[:, None])[:, 0], is_), 1)

    return Prompts(text(asked[:, 0]), text(asked[:, 1]), c.gather(1, asked))
