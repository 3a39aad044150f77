"""Numbers on a staircase of bits, by loops: what a token of some age is rounded to, and what a policy reads of it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from regard.cache.layer import Part
from regard.cache.staircase import Staircase
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.decoding import llama


def rounded(x: list[float], bits: int) -> list[float]:
    step = (max(x) - min(x)) / (2**bits - 1)
    return [min(x) + step * (round((a - min(x)) / step) if step else 0) for a in x]


def lowered(rows: Tensor, bits: int, group: int, keys: bool) -> Tensor:
    """Tokens (group, D) of one head: keys by channel over all of them, values by token over `group` channels."""
    out = rows.clone()
    if keys:
        for channel in range(rows.shape[1]):
            out[:, channel] = torch.tensor(rounded(rows[:, channel].tolist(), bits), dtype=F64)
    else:
        for token, at in itertools.product(range(len(rows)), range(0, rows.shape[1], group)):
            out[token, at : at + group] = torch.tensor(rounded(rows[token, at : at + group].tolist(), bits), dtype=F64)
    return out


class Watched(Staircase):
    """Keeps what every call reads."""

    def begin(self, layers: int, heads: int) -> None:
        self.reads: list[Part] = []

    def reading(self, view: Any) -> Part:
        self.reads.append(super().reading(view))
        return self.reads[-1]


BITS, EDGES, GROUP, PROMPT, STEPS = (16, 8, 4, 2), (5, 13, 22), 4, 30, 14


def read_by(policy: Any, kv_heads: int = 1) -> tuple[Any, Tensor, Tensor, Any]:
    """(policy, keys, values (B, h, n, D) of all tokens in full precision, the session's cache) after a prompt and steps of one layer."""
    torch.manual_seed(0)
    model, ids = llama(layers=1, heads=4, kv_heads=kv_heads, dim=32), torch.randint(50, (2, PROMPT + STEPS))
    with torch.no_grad():
        whole = model(ids, use_cache=True).past_key_values.layers[0]
        with policy(model) as session:
            cache = model(ids[:, :PROMPT], use_cache=True).past_key_values
            for at in range(PROMPT, PROMPT + STEPS):
                model(ids[:, at : at + 1], past_key_values=cache)
    return policy, whole.keys, whole.values, session.cache


def stair(group: int, seen: int) -> int:
    """Which stair the group of tokens stands on after `seen` tokens, by the age of its newest."""
    age = seen - (group + 1) * GROUP
    return sum(age >= edge for edge in EDGES)
