"""Strings hidden in filler text and all asked for at its end."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RegardError


def passkeys(
    filler: Tensor,
    length: int,
    count: int = 10,
    words: int = 32,
    marks: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Ids (1, about length) of filler text with `count` strings of `words` tokens, at depths 0.05 to 0.95, all asked for at the end, and which
    tokens repeat them. filler (n,): tokens; words are drawn from them. marks: tokens before a string where it stands, and where it is asked for."""
    room = length - 2 * count * words
    if room < count or len(filler) < 2:
        raise RegardError(f"length={length}: expected more than twice {count} strings of {words} tokens, and filler of at least 2 tokens")
    none = filler[:0]
    stands, asks = marks or (none, none)
    start = int(torch.randint(len(filler), (), generator=generator))
    text = filler.repeat(-(-(room + start) // len(filler)))[start : start + room]
    keys = [filler[torch.randint(len(filler), (words,), generator=generator)] for _ in range(count)]
    depths = torch.linspace(0.05, 0.95, count).mul(room).long().tolist()
    pieces, last = [], 0
    for key, depth in zip(keys, depths, strict=True):
        pieces += [text[last:depth], stands, key]
        last = depth
    pieces.append(text[last:])
    asked = [torch.zeros(sum(map(len, pieces)), dtype=torch.bool)]
    for key in keys:
        pieces += [asks, key]
        asked += [torch.zeros(len(asks), dtype=torch.bool), torch.ones(words, dtype=torch.bool)]
    return torch.cat(pieces)[None], torch.cat(asked)[None]
