"""Checks of lolcats."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regard import models
from regard.adapt.kept_state import state_bytes
from regard.adapt.recipe import carry_out
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.converting import draws, heads_by_hand, shaken, streamed, student_of, tiny_bits, turned
from regard.lab.checks.shared.decoding import llama
from regard.lab.verification import check
from regard.zoo.systems.lolcats import attention_transfer, convert_lolcats, heads_matched, lora_finetune


def phi(x: Tensor, weight: Tensor, half: bool, eps: float) -> Tensor:
    """The feature vector of one token, x (d,)."""
    y = x @ weight
    e, f = torch.exp(y - y.max()), torch.exp(-y + y.min())
    parts = [e / e.sum()] if half else [e / e.sum(), f / f.sum()]
    return torch.cat(parts).clamp_min(eps)


def by_hand(layer: Any, x: Tensor, window: int, shift: bool = True, affine: bool = False, half: bool = False, eps: float = 1e-12) -> Tensor:
    """The layer's output in loops over rows, heads, queries and keys."""
    h = heads_by_hand(layer, x)
    batch, heads, length, d = h.q.shape
    rows = []
    for b in range(batch):
        columns = []
        for a in range(heads):
            g, outs = 1 / (1 + torch.exp(-layer.gamma[0, a, 0, 0])), []
            for i in range(length):
                near = range(max(0, i - window + 1), i + 1)
                s = torch.stack([(h.turned_q[b, a, i] * h.turned_k[b, a, j]).sum() / math.sqrt(d) for j in near])
                weights = [g * torch.exp(z - (s.max() if shift else 0)) for z in s]
                keys = list(near)
                for j in range(near.start):
                    w = phi(h.turned_q[b, a, i], layer.query_map[a], half, eps) @ phi(h.turned_k[b, a, j], layer.key_map[a], half, eps)
                    weights.append(w * (1 - g) if affine else w)
                    keys.append(j)
                w_all = torch.stack(weights)
                outs.append((w_all[:, None] * h.v[b, a, keys]).sum(0) / w_all.sum())
            columns.append(torch.stack(outs))
        rows.append(torch.cat(columns, -1))
    return torch.stack(rows) @ layer.o_proj.weight.T


@check(
    "lolcats",
    "a layer (4 heads over 2, 9 tokens, window 3) equals loops: released and exact weights, affine, tied maps, half features, eps; and gradients",
    below=1e-10,
    control="the window's weights without their shift",
)
def _() -> tuple[float, float]:
    own, other = 0.0, math.inf
    x = torch.randn(2, 9, 32, dtype=F64, requires_grad=True)
    for options, form in (
        ({}, {}),
        ({"stabilise": "exact"}, {"shift": False}),
        ({"affine": True, "gamma": 0.3}, {"affine": True}),
        ({"tie": True, "form": "half", "eps": 0.3}, {"half": True, "eps": 0.3}),
    ):
        model = llama()
        layer = shaken(student_of(convert_lolcats(model, 3, 5, **options)).double())
        found = layer.run(x, turned(model, x))[0]
        leaves = (x, *layer.parameters())
        own = max(own, gap_with_gradients(found, by_hand(layer, x, 3, **form), leaves))
        if not options:
            other = naive.gap(found, by_hand(layer, x, 3, shift=False))
    return own, other


@check(
    "lolcats",
    "a window as long as the text: logits of a Llama equal its own softmax's, whatever the factors and maps",
    below=1e-10,
    control="a window of 11 of 12 tokens",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = llama(), torch.randint(1, 50, (2, 12))
    truth, gaps = model(ids, use_cache=False).logits, []
    for window in (12, 11):
        with convert_lolcats(model, window, 5) as conversion:
            for student in conversion.students.values():
                for p in (student.gamma, student.query_map, student.key_map):  # type: ignore[union-attr]
                    p.add_(torch.randn_like(p))
            gaps.append(naive.gap(model(ids, use_cache=False).logits, truth))
    return gaps[0], gaps[1]


@check(
    "lolcats",
    "a text read in pieces and token by token, windows 1, 8 and 32 of 40 tokens: logits equal the whole pass",
    below=1e-10,
    control="keys that leave the window are forgotten",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    ids, own, other = torch.randint(1, 50, (2, 40)), 0.0, math.inf
    for window in (1, 8, 32):
        model = llama()
        conversion = convert_lolcats(model, window, 5)
        truth = model(ids, use_cache=False).logits
        own = max(own, naive.gap(streamed(model, ids)[0], truth))
        for student in conversion.students.values():
            student.key_map.mul_(0)  # type: ignore[operator, union-attr]
            student.eps = 0.0  # type: ignore[assignment]
            student.features = lambda x, weight: x.new_zeros(*x.shape[:-1], 10)  # type: ignore[assignment, method-assign]
        other = min(other, naive.gap(streamed(model, ids)[0], truth))
    return own, other


@check(
    "lolcats",
    "bytes of the decode state at 90 tokens over those at 40 (window 16), less one",
    below=0.0,
    control="keys and values of the model itself",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = llama(), torch.randint(1, 50, (1, 90))

    def grown(count: Any) -> float:
        return count(streamed(model, ids)[1]) / count(streamed(model, ids[:, :40])[1]) - 1

    plain = grown(lambda cache: sum(layer.keys.numel() for layer in cache.layers))
    convert_lolcats(model, 16, 5)
    return grown(state_bytes), plain


@check(
    "lolcats",
    "attention transfer of a random layer (300 steps): error of each head's output over its first value",
    below=0.2,
    control="1 + elu in place of learned maps, the same window",
)
def _() -> tuple[float, float]:
    model = llama(heads=2, kv_heads=2, layers=1)
    conversion = convert_lolcats(model, 8, 16)
    layer = student_of(conversion).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 64, 32, generator=generator, dtype=F64).cumsum(1)
    x = x / x.norm(dim=-1, keepdim=True) * 32**0.5
    lesson = ((), {"hidden_states": x, "position_embeddings": turned(model, x)}, None)
    learned = [layer.query_map, layer.key_map, layer.gamma]
    optimizer = torch.optim.AdamW(learned, 1e-2, weight_decay=0.0)
    first = heads_matched(layer, lesson).item()
    for _step in range(300):
        loss = heads_matched(layer, lesson)
        optimizer.zero_grad()
        loss.backward(inputs=learned)
        optimizer.step()
    last = heads_matched(layer, lesson).item()
    layer.features = lambda x, weight: torch.nn.functional.elu(x) + 1
    return last / first, heads_matched(layer, lesson).item() / first


def bits(recipe: list[Any]) -> float:
    model = models.load("tiny")
    conversion = convert_lolcats(model, 16, 16)
    carry_out(conversion, recipe, draws(2, 96))
    return tiny_bits(model)


@check(
    "lolcats",
    "the tiny model with windows of 16, 24 steps of transfer and 8 of LoRA: bits per byte of held-out text beyond its own",
    below=1.6,
    control="32 steps of LoRA without transfer",
)
def _() -> tuple[float, float]:
    own = tiny_bits(models.load("tiny"))
    transfer = attention_transfer(24, accumulate=1, lr=2e-2)
    tune = {"accumulate": 1, "lr": 1e-3}
    return bits([transfer, lora_finetune(8, **tune)]) - own, bits([lora_finetune(32, **tune)]) - own
