"""Checks of longheads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal, Rope
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.sparse.longheads import LongHeads, LongHeadsCache


def long_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(1, 4, 160, 16, dtype=F64) for _ in range(3))  # type: ignore[return-value]


def longheads_loop(q: Tensor, k: Tensor, v: Tensor, i: int, w: int, n: int) -> Tensor:
    """One query and head at a time: q, k, v (L, D) unrotated -> the output of query i >= n w."""
    rope, scale = Rope(), q.shape[-1] ** -0.5
    own, keys = i // w, {}
    for c in range(1, own - 1):
        part, at = slice(c * w, c * w + w), torch.arange(w)
        turned_q, turned_k = rope.rotate(q[part], at), rope.rotate(k[part], at)
        value = ((turned_q @ turned_k.T * scale).softmax(-1) @ v[part]).mean(0)
        keys[c] = (turned_k @ value * scale).softmax(0) @ turned_k
    forced = sorted({0, own - 1, own})
    best = sorted(keys, key=lambda c: (-float(q[i] @ keys[c]), c))[: n - len(forced)]
    chosen = sorted([*forced, *best])
    tokens = [j for c in chosen for j in range(c * w, c * w + w)]
    place = {j: at for at, j in enumerate(tokens) if j <= i}
    s = torch.stack(
        [
            rope.rotate(q[i : i + 1], torch.tensor([(n - 1) * w + i % w]))[0] @ rope.rotate(k[j : j + 1], torch.tensor([at]))[0]
            for j, at in place.items()
        ]
    )
    return (s * scale).softmax(0) @ v[list(place)]


@check("longheads", "up to attend_len tokens: dense rotary attention", below=1e-12, control="40 tokens where 32 are dense")
def _() -> tuple[float, float]:
    q, k, v = long_inputs()
    heads, at = LongHeads(8, 32), torch.arange(160)
    dense = attend(Rope().rotate(q, at), Rope().rotate(k, at), v, mask=Causal())
    return tuple(naive.gap(heads.prefill(q[:, :, :n], k[:, :, :n], v[:, :, :n]), dense[:, :, :n]) for n in (32, 160))  # type: ignore[return-value]


@check(
    "longheads",
    "160 tokens: prefill equals a loop over queries and chunks, and decoding token by token",
    below=1e-10,
    control="the query at its true position",
)
def _() -> tuple[float, float]:
    q, k, v = long_inputs()
    heads = LongHeads(8, 32)
    out, cache, steps = heads.prefill(q, k, v), LongHeadsCache(), []
    for t in range(160):
        o, cache = heads.step(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], cache)
        steps.append(o)
    loops = [(h, i, longheads_loop(q[0, h], k[0, h], v[0, h], i, 8, 4)) for h in range(4) for i in range(33, 160, 9)]
    gap = max(naive.gap(out[0, h, i], truth) for h, i, truth in loops)
    at = torch.arange(160)
    dense = attend(Rope().rotate(q, at), Rope().rotate(k, at), v, mask=Causal())
    return max(gap, naive.gap(torch.cat(steps, 2), out)), min(naive.gap(dense[0, h, i], truth) for h, i, truth in loops)


@check(
    "longheads",
    "every query reads 4 chunks, among them 0, its own and the one before, none twice or ahead: exceptions",
    below=0,
    control="the same queries counted one chunk further on",
)
def _() -> tuple[float, float]:
    q, k, v = long_inputs()
    heads = LongHeads(8, 32)
    ids = heads.select(q[:, :, 32:], heads.chunk_keys(q, k, v), 32)
    wrong = []
    for shift in (0, 1):
        own = (torch.arange(32, 160) // 8 + shift)[:, None]
        good = (ids == 0).any(-1) & (ids == own).any(-1) & (ids == own - 1).any(-1) & (ids <= own).all(-1) & (ids.diff(dim=-1) > 0).all(-1)
        wrong.append(float((~good).sum()))
    return wrong[0], wrong[1]


@check(
    "longheads",
    "a chunk like the last query is chosen wherever it stands: the fewest of 4 heads over 14 places",
    above=3,
    control="queries rotated before the choice",
)
def _() -> tuple[float, float]:
    heads, found = LongHeads(8, 32), {True: [], False: []}  # type: ignore[var-annotated]
    direction = F.normalize(torch.randn(4, 16, dtype=F64), dim=-1)
    for chunk in range(2, 16):
        q, k, v = long_inputs()
        noise = F.normalize(torch.randn(1, 4, 8, 16, dtype=F64), dim=-1)
        k = F.normalize(k, dim=-1) * 4
        k[:, :, chunk * 8 : chunk * 8 + 8] = (0.9 * direction[None, :, None] + 0.436 * noise) * 4
        q[:, :, -1] = 4 * direction
        keys = heads.chunk_keys(q, k, v)
        for turned in (False, True):
            last = Rope().rotate(q[:, :, -1:], torch.tensor([159])) if turned else q[:, :, -1:]
            found[turned].append(float((heads.select(last, keys, 159) == chunk).any(-1).sum()))
    return min(found[False]), min(found[True])
