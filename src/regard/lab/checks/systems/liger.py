"""Checks of liger."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from regard import models
from regard.adapt.kept_state import state_bytes
from regard.adapt.recipe import carry_out
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.converting import draws, heads_by_hand, shaken, streamed, student_of, tiny_bits, turned
from regard.lab.checks.shared.decoding import llama
from regard.lab.verification import check
from regard.zoo.systems.liger import KINDS, convert_liger, liger_lora


def pooled(x: Tensor, size: int) -> Tensor:
    """Adaptive means of the last dimension: entry i averages channels floor(i n / size) to ceil((i + 1) n / size)."""
    n = x.shape[-1]
    return torch.stack([x[..., i * n // size : -(-(i + 1) * n // size)].mean(-1) for i in range(size)], -1)


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def by_hand(layer: Any, x: Tensor, kind: str, window: int, mix: float = 0.5, tau: float = 16.0, slots: int = 128) -> Tensor:
    """The layer's output, a token and a head at a time; softmax sees `window` keys before a token's own."""
    h, d = heads_by_hand(layer, x), layer.head_dim
    batch, heads, length, _ = h.q.shape
    keys = x @ layer.k_proj.weight.T
    pool = pooled(keys, slots * layer.kv_heads) if kind == "gsa" else keys
    gates = torch.stack(pool.chunk(layer.kv_heads, -1), 1)
    rows = []
    for b in range(batch):
        columns = []
        for a in range(heads):
            gate, outs = gates[b, a * layer.kv_heads // heads], []
            state = torch.zeros(d, d, dtype=F64)
            slot_k, slot_v = (torch.zeros(slots, d, dtype=F64) for _ in range(2))
            for i in range(length):
                q, k, v = h.q[b, a, i], h.k[b, a, i], h.v[b, a, i]
                if kind == "gsa":
                    fade = torch.exp(log_sigmoid(gate[i]) / tau)[:, None]
                    slot_k, slot_v = fade * slot_k + (1 - fade) * k, fade * slot_v + (1 - fade) * v
                    o = naive.softmax(slot_k @ q) @ slot_v
                else:
                    fade = torch.exp(log_sigmoid(gate[i]) / (1 if kind == "hgrn2" else tau))
                    write = 1 - fade if kind == "hgrn2" else naive.softmax(k)
                    state = fade[:, None] * state + torch.outer(write, v)
                    o = naive.softmax(q) @ state
                near = list(range(max(0, i - window), i + 1))
                p = naive.softmax(h.turned_k[b, a, near] @ h.turned_q[b, a, i] / math.sqrt(d))
                outs.append(mix * (p @ h.v[b, a, near]) + (1 - mix) * o)
            columns.append(torch.stack(outs))
        rows.append(torch.cat(columns, -1))
    return torch.stack(rows) @ layer.o_proj.weight.T


@check(
    "liger",
    "a layer of each kind (4 heads over 2, 7 tokens, window 3, also other mix, temperature and 5 slots) equals loops over tokens; and gradients",
    below=1e-10,
    control="a window of one key less",
)
def _() -> tuple[float, float]:
    own, other = 0.0, math.inf
    x = torch.randn(2, 7, 32, dtype=F64, requires_grad=True)
    for kind in KINDS:
        for options in ({}, {"mix": 0.3, "tau": 4.0, "slots": 5}):
            model = llama()
            layer = shaken(student_of(convert_liger(model, kind, 3, **options)))
            found = layer.run(x, turned(model, x))[0]
            own = max(own, gap_with_gradients(found, by_hand(layer, x, kind, 3, **options), (x, *layer.parameters())))
            other = min(other, naive.gap(found, by_hand(layer, x, kind, 2, **options)))
    return own, other


def unlike(model: nn.Module, other: nn.Module) -> float:
    shapes = [{name: tuple(p.shape) for name, p in one.state_dict().items()} for one in (model, other)]
    return float(sum(shapes[0].get(name) != shapes[1].get(name) for name in shapes[0].keys() | shapes[1].keys()))


@check(
    "liger",
    "entries of the converted model's state that are not the model's own, by name and shape; the model's weights load strictly",
    below=0.0,
    control="a projection for gates",
)
def _() -> tuple[float, float]:
    plain, other = llama(), 0.0
    for kind in KINDS:
        model = llama()
        conversion = convert_liger(model, kind)
        model.load_state_dict(plain.state_dict(), strict=True)
        if unlike(model, plain):
            return 1.0, 0.0
        for student in conversion.students.values():
            student.gate = nn.Linear(32, 16)  # type: ignore[assignment]
        other = unlike(model, plain)
    return 0.0, other


@check(
    "liger",
    "each kind, a text of 30 read in pieces and token by token: logits equal the whole pass",
    below=1e-10,
    control="the window alone is remembered",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    ids, own, other = torch.randint(1, 50, (2, 30)), 0.0, math.inf
    for kind in KINDS:
        model = llama()
        conversion = convert_liger(model, kind, 6, slots=5)
        truth = model(ids, use_cache=False).logits
        own = max(own, naive.gap(streamed(model, ids)[0], truth))
        for student in conversion.students.values():
            run: Any = student.recurrent
            student.recurrent = lambda *given, run=run: run(*given[:4], None)  # type: ignore[assignment, method-assign]
        other = min(other, naive.gap(streamed(model, ids)[0], truth))
    return own, other


@check(
    "liger",
    "hgrn2: a state of rows v that reads v 200 times stays as it is, since what is written and what is kept add up to one",
    below=1e-12,
    control="gla, where they do not",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    gaps = []
    for kind in ("hgrn2", "gla"):
        layer = student_of(convert_liger(llama(heads=2), kind))
        v = torch.randn(1, 2, 1, layer.head_dim, dtype=F64)
        tokens = layer.projected(
            torch.randn(1, 200, 32, dtype=F64), (torch.ones(1, 200, 1, dtype=F64), torch.zeros(1, 200, 1, dtype=F64)), None
        )
        held = v.expand(-1, -1, layer.head_dim, -1)
        _, state = layer.recurrent(tokens.q, tokens.k, v.expand(-1, -1, 200, -1), tokens, held)
        gaps.append(naive.gap(state.s, held))
    return gaps[0], gaps[1]


@check(
    "liger",
    "softmax's share 1 and a window of 11 keys before: logits of 12 tokens equal the model's own",
    below=1e-10,
    control="10 keys before",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = llama(), torch.randint(1, 50, (2, 12))
    truth, gaps = model(ids, use_cache=False).logits, []
    for window in (11, 10):
        with convert_liger(model, window=window, mix=1.0):
            gaps.append(naive.gap(model(ids, use_cache=False).logits, truth))
    return gaps[0], gaps[1]


@check(
    "liger",
    "bytes of the decode state of each kind at 90 tokens over those at 40 (window 16), less one",
    below=0.0,
    control="keys and values of the model itself",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    ids, own = torch.randint(1, 50, (1, 90)), 0.0

    def grown(model: Any, count: Any) -> float:
        return abs(count(streamed(model, ids)[1]) / count(streamed(model, ids[:, :40])[1]) - 1)

    for kind in KINDS:
        model = llama()
        convert_liger(model, kind, 16, slots=5)
        own = max(own, grown(model, state_bytes))
    return own, grown(llama(), lambda cache: sum(layer.keys.numel() for layer in cache.layers))


def recovered(fresh: bool) -> float:
    """Bits per byte of the tiny model in its hgrn2 form after a short recovery. fresh: its projections of attention are drawn anew."""
    model = models.load("tiny")
    conversion = convert_liger(model, "hgrn2", 16)
    for student in conversion.students.values() if fresh else ():
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(student, name).weight.data.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    carry_out(conversion, [liger_lora(24, lr=2e-3, accumulate=1)], draws(2, 96))
    return tiny_bits(model)


@check(
    "liger",
    "the tiny model in its hgrn2 form with windows of 16, 24 steps of LoRA: bits per byte of held-out text",
    below=2.6,
    control="query, key and value weights drawn anew",
)
def _() -> tuple[float, float]:
    return recovered(False), recovered(True)
