"""Checks of vatp."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from regard.cache.layer import Part
from regard.cache.view import View
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.decoding import llama
from regard.lab.verification import check
from regard.zoo.systems.vatp import VATP

SHIFTS: dict[str, Any] = {"h2o": {}, "scissorhands": {"base": "scissorhands", "window": 5, "heavy": 0.3}}


def by_hand(model: Any, ids: Tensor, steps: int, base: str, values: bool = True) -> list[list[list[list[int]]]]:
    """Places that stay after the prompt and after each step, [call][layer][head]; one row, weights of masked attention in the open."""
    length, group = ids.shape[1], 2
    layers = len(model.model.layers)
    keep = [[list(range(length)) for _ in range(2)] for _ in range(layers)]
    mass = [[torch.zeros(length + steps, dtype=F64) for _ in range(2)] for _ in range(layers)]
    found, text = [], ids
    seen = [torch.ones(2, length + steps, length + steps, dtype=torch.bool).tril() for _ in range(layers)]
    for call in range(steps + 1):
        n = length + call
        x = model.model.embed_tokens(text)
        cos, sin = model.model.rotary_emb(x, torch.arange(n)[None])
        fresh: list[list[list[int]]] = []
        for at, layer in enumerate(model.model.layers):
            y, own = layer.input_layernorm(x), layer.self_attn
            q, k, v = (proj(y).view(n, -1, 8).transpose(0, 1) for proj in (own.q_proj, own.k_proj, own.v_proj))
            q, k = (t * cos + torch.cat((-t[..., 4:], t[..., :4]), -1) * sin for t in (q, k))
            out, kept = [], []
            for h in range(4):
                s = (q[h] @ k[h // group].T * 8**-0.5).masked_fill(~seen[at][h // group][:n, :n], -torch.inf)
                p = s.softmax(-1)
                out.append(p @ v[h // group])
                rows = range(n) if call == 0 else [n - 1]
                for i in rows:
                    if base == "h2o" or call:
                        mass[at][h // group][:n] += p[i]
                    elif i >= n - 5:
                        mass[at][h // group][:n] += p[i] / 5
            for g in range(2):
                there = keep[at][g] if call == 0 else [*keep[at][g], n - 1]
                worth = mass[at][g][:n] * (v[g].abs().sum(-1) if values else 1)
                recent, heavy = (int(0.25 * length), int(0.25 * length)) if base == "h2o" else (10, 2 * int(0.3 * length) - 10)
                last, rest = there[-recent:], there[:-recent]
                rest = sorted(rest, key=lambda j, w=worth: -torch.inf if j < 3 and values else -float(w[j]))[:heavy]
                kept.append(sorted([*rest, *last]))
                keep[at][g] = kept[-1]
                seen[at][g, n:, :n] = False
                seen[at][g, n:, kept[-1]] = True
            fresh.append(kept)
            x = x + own.o_proj(torch.cat(out, -1))[None]
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        found.append(fresh)
        text = torch.cat((text, model.lm_head(model.model.norm(x))[:, -1:].argmax(-1)), 1)
    return found


@check(
    "vatp",
    "both bases, the prompt and five steps of a grouped model: entries that stay which a plain loop drops",
    below=0.0,
    control="loops without values and first tokens",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    own = other = 0
    for base, options in SHIFTS.items():
        model, ids = llama(sharp=2), torch.stack([torch.randperm(49)[:41] + 1])
        with VATP(sink=3, **options)(model) as session:
            out, found = model(ids), []
            for _ in range(6):
                found.append(
                    [[part.places[0, head].tolist() for part in layer.parts for head in range(2)] for layer in session.cache.layers]
                )
                out = model(out.logits[:, -1:].argmax(-1), past_key_values=session.cache)
        assert all(layer.bytes == len(found[-1][0][0]) * 2 * 2 * 8 * 8 for layer in session.cache.layers)
        for values in (True, False):
            truth = by_hand(model, ids, 5, base, values)
            gap = sum(
                len(set(a) - set(b))
                for x, y in zip(found, truth, strict=True)
                for c, d in zip(x, y, strict=True)
                for a, b in zip(c, d, strict=True)
            )
            own, other = (own + gap, other) if values else (own, other + gap)
    return float(own), float(other)


def planted(weights: Tensor, values: Tensor) -> View:
    """A call whose attention is these weights (n, length), of one head: queries that give them exactly over keys of unit vectors."""
    m = weights.shape[1]
    key = torch.eye(m, dtype=F64)[None, None]
    part = Part(torch.arange(1), key, values[None, None], torch.arange(m)[None, None], torch.ones(1, 1, m, dtype=torch.bool))
    return View(0, 1, True, m, part, weights.log()[None, None, None], 1.0, None, {"prompt": torch.tensor([m])})


def dropped(policy: VATP, a: Tensor, v: Tensor) -> tuple[Tensor, float]:
    """Entries that stay of one query's weights a (m,), and the mass a_k |v_k| of those that do not."""
    view = planted(a[None], v)
    policy.observe(view)
    scores, count = policy.scores(view)[0, 0], int(policy.counts(view, policy.scores(view))[0, 0])
    keep = scores.argsort(descending=True)[:count]
    gone = torch.ones(len(a), dtype=torch.bool)
    gone[keep] = False
    return keep, float((a * v.abs().sum(-1))[gone].sum())


@check(
    "vatp",
    "20 draws of 12 entries, 6 kept: dropped mass beyond the least of all choices (which bounds the error of the sum)",
    below=1e-9,
    control="attention alone",
)
def _() -> tuple[float, float]:
    gaps = [0.0, 0.0]
    for _ in range(20):
        a, v = torch.randn(12, dtype=F64).mul(1.5).softmax(0), torch.randn(12, 4, dtype=F64) * torch.rand(12, 1, dtype=F64) ** 2
        worth = a * v.abs().sum(-1)
        least = min(float(worth.sum() - worth[list(keep)].sum()) for keep in itertools.combinations(range(12), 6))
        for at, values in enumerate((True, False)):
            keep, mass = dropped(VATP(sink=0, heavy=0.5, recent=0.0, values=values), a, v)
            assert float((a @ v - a[keep] @ v[keep]).abs().sum()) <= mass + 1e-9
            gaps[at] = max(gaps[at], mass - least)
    return gaps[0], gaps[1]


@check(
    "vatp",
    "48 of 98 entries with raised attention and hundredth values: relative error of the sum, 64 of 128 kept, mean of 20",
    below=0.4,
    control="attention alone",
)
def _() -> tuple[float, float]:
    errors = [0.0, 0.0]
    for _ in range(20):
        s, v = 0.5 * torch.randn(128, dtype=F64), torch.randn(128, 16, dtype=F64)
        low = 20 + torch.randperm(98)[:48]
        s[low] += 1.0
        v[low] *= 0.01
        a = s.softmax(0)
        for at, values in enumerate((True, False)):
            keep, _ = dropped(VATP(sink=0, heavy=0.42, recent=10 / 128, values=values), a, v)
            errors[at] += float((a @ v - a[keep] @ v[keep]).norm() / (a @ v).norm()) / 20
    return errors[0], errors[1]


@check("vatp", "values of one size: entries that the base keeps and it does not", below=0.0, control="values as they are")
def _() -> tuple[float, float]:
    a, v = torch.randn(60, dtype=F64).softmax(0), torch.randn(60, 4, dtype=F64) * torch.rand(60, 1, dtype=F64)
    even = v / v.abs().sum(-1, keepdim=True)
    base = set(dropped(VATP(sink=0, values=False), a, v)[0].tolist())
    return tuple(float(len(base - set(dropped(VATP(sink=0), a, x)[0].tolist()))) for x in (even, v))


@check("vatp", "a sink of tiny value (place 0): how often it stays", above=1.0, control="without the exemption of first tokens")
def _() -> tuple[float, float]:
    v = torch.randn(60, 4, dtype=F64)
    v[0] *= 1e-6
    a = torch.cat((torch.full((1,), 3.0, dtype=F64), torch.randn(59, dtype=F64))).softmax(0)
    return tuple(float(0 in dropped(VATP(sink=sink), a, v)[0].tolist()) for sink in (20, 0))
