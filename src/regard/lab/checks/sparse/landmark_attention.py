"""Checks of landmark-attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import gradcheck

from regard.lab import naive
from regard.lab.checks.shared.byhand import join_heads, rotary, split_heads
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.long_context import grouped_loop
from regard.lab.verification import check
from regard.nn.landmarks import grouped_softmax, with_landmarks
from regard.zoo.sparse.landmark_attention import LandmarkAttention, LandmarkCache


@check(
    "landmark-attention",
    "4 blocks of 7 + 1: weights equal a loop, rows sum to one, landmarks weigh nothing, gradcheck",
    below=1e-12,
    control="one softmax over all tokens",
)
def _() -> tuple[float, float]:
    s = torch.randn(2, 32, 32, dtype=F64, requires_grad=True)
    p = grouped_softmax(s, 7).detach()
    truth = torch.stack([grouped_loop(x, 7) for x in s])
    whole = float((p.sum(-1) - 1).abs().max() + p[..., 7::8].abs().max())
    good = gradcheck(lambda x: grouped_softmax(x, 7), (s[:1].detach().requires_grad_(),), raise_exception=False)
    plain = s.masked_fill(~torch.ones(32, 32, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    return naive.gap(p, truth) + whole if good else math.inf, naive.gap(plain, truth)


@check(
    "landmark-attention",
    "landmark logits set to their block's log-sum-exp give the softmax over ordinary tokens",
    below=1e-10,
    control="landmark logits as they are",
)
def _() -> tuple[float, float]:
    s = torch.randn(2, 32, 32, dtype=F64)
    set_to = s.clone()
    for b in range(4):
        set_to[..., b * 8 + 7] = s[..., b * 8 : b * 8 + 7].logsumexp(-1)
    ordinary = torch.ones(32, 32, dtype=torch.bool).tril() & (torch.arange(32) % 8 != 7)
    truth = s.masked_fill(~ordinary, -math.inf).softmax(-1)
    return naive.gap(grouped_softmax(set_to, 7), truth), naive.gap(grouped_softmax(s, 7), truth)


@check(
    "landmark-attention",
    "cached steps that retrieve all blocks equal the full pass, with rotary positions too",
    below=1e-10,
    control="one block retrieved",
)
def _() -> tuple[float, float]:
    x, gaps = torch.randn(2, 37, 16, dtype=F64), {4: 0.0, 1: 0.0}
    with torch.no_grad():
        for rope in (False, True):
            for top in gaps:
                torch.manual_seed(0)
                layer = LandmarkAttention(16, 2, block=7, rope=rope, top_blocks=top).double()
                cache, outs = LandmarkCache(), []
                for t in range(37):
                    out, cache = layer.step(x[:, t : t + 1], cache)
                    outs.append(out)
                gaps[top] = max(gaps[top], naive.gap(torch.cat(outs, 1), layer(x)))
    return gaps[4], gaps[1]


@check(
    "landmark-attention",
    "one block retrieved: weight outside the own block and the block of the highest landmark logit",
    below=0,
    control="two blocks",
)
def _() -> tuple[float, float]:
    s = torch.randn(1, 37, dtype=F64)
    best = s[0, 7:32:8].argsort(descending=True)

    def outside(count: int) -> float:
        opened = torch.zeros(1, 5, dtype=torch.bool)
        opened[0, best[:count]] = True
        p = grouped_softmax(s, 7, 36, opened)[0]
        return float(p.sum() - p[32:].sum() - p[int(best[0]) * 8 : int(best[0]) * 8 + 7].sum())

    return max(0.0, outside(1) - 1e-15), outside(2)


@check("landmark-attention", "landmark ids follow every 3 tokens: tokens out of place", below=0, control="every 4")
def _() -> tuple[float, float]:
    tokens = torch.arange(1, 8)[None]
    truth = torch.tensor([[1, 2, 3, 0, 4, 5, 6, 0, 7]])
    found = [with_landmarks(tokens, block, 0) for block in (3, 4)]
    return float((found[0] != truth).sum()), float(abs(found[1].shape[1] - 9))


def named_loop(s: Tensor, landmarks: Tensor) -> Tensor:
    """Weights (n, n) of one head's logits with landmarks (n,) wherever they stand, row by row."""
    n, places = s.shape[0], landmarks.nonzero().flatten().tolist()
    weights = torch.zeros_like(s)
    for i in range(n):
        ends = [p for p in places if p < i]
        first = ends[-1] + 1 if ends else 0
        own = [j for j in range(first, i + 1) if not landmarks[j]]
        if not own + ends:
            continue
        p0 = dict(zip(own + ends, s[i, own + ends].softmax(0), strict=True))
        for j in own:
            weights[i, j] = p0[j]
        for at, end in enumerate(ends):
            inside = list(range(ends[at - 1] + 1 if at else 0, end))
            if inside:
                weights[i, inside] = p0[end] * s[i, inside].softmax(0)
    return weights


@check(
    "landmark-attention",
    "the layer from its weights: rotary positions, biases, landmarks at their places and wherever they are named, two of them in a row too",
    below=1e-10,
    control="one landmark less",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    layer, x = LandmarkAttention(16, 2, block=4, bias=True).double(), torch.randn(2, 23, 16, dtype=F64)
    q, k, v = (split_heads(y, 2) for y in (x @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, -1))
    q, k = (rotary(y, torch.arange(23)) for y in (q, k))
    s = q @ k.transpose(-1, -2) / math.sqrt(8)

    def by_hand(landmarks: Tensor) -> Tensor:
        p = torch.stack([torch.stack([named_loop(s[b, h], landmarks[b]) for h in range(2)]) for b in range(2)])
        return join_heads(p @ v) @ layer.out.weight.T + layer.out.bias

    marks = torch.zeros(2, 23, dtype=torch.bool)
    marks[0, [2, 3, 9, 17]], marks[1, [0, 11, 22]] = True, True
    regular = (torch.arange(23) % 5 == 4).expand(2, -1)
    own = max(
        naive.gap(layer(x, marks), by_hand(marks)), naive.gap(layer(x), by_hand(regular)), naive.gap(layer(x, regular), by_hand(regular))
    )
    fewer = marks.clone()
    fewer[0, 9] = False
    return own, naive.gap(layer(x, marks), by_hand(fewer))


def turn(y: Tensor, place: int) -> Tensor:
    return rotary(y[None], torch.tensor([place]))[0]


def opened_loop(layer: LandmarkAttention, x: Tensor, selection: str) -> Tensor:
    """Tokens 26, 27, 28 of x (1, 29, dim), blocks of 4 + 1, two of them opened by `selection`, placed as the layer says."""
    size, top, places = 5, 2, layer.places
    q, k, v = (split_heads(y, 2)[0] for y in (x @ layer.qkv.weight.T).chunk(3, -1))
    probabilities, heads = torch.zeros(2, 3, 5, dtype=F64), torch.zeros(2, 3, 8, dtype=F64)
    for h in range(2):
        for n in range(3):
            home = min(5, top + 1) * size + 1 + n if places == "front" else 26 + n
            slots = [max(0, b - 3 + 1) if places == "front" else b for b in range(5)]
            s = [turn(q[h, 26 + n], home) @ turn(k[h, b * size + 4], slots[b] * size + 4) / math.sqrt(8) for b in range(5)]
            probabilities[h, n] = torch.stack(s).softmax(0)
    for h in range(2):
        for n in range(3):
            p = {"token_and_head": probabilities[h, n], "heads": probabilities.amax(0)[n], "tokens": probabilities.amax(1)[h]}[selection]
            best = sorted(p.argsort(descending=True)[:top].tolist())
            slots = {"near": [3, 4], "true": best, "front": [r + (b >= 3) for r, b in enumerate(best)]}[places]
            home = min(5, top + 1) * size if places == "front" else 25
            query = turn(q[h, 26 + n], home + 1 + n) / math.sqrt(8)
            near = [query @ turn(k[h, 25 + m], home + m) for m in range(n + 2)]
            inside = [
                torch.stack([query @ turn(k[h, b * size + m], c * size + m) for m in range(5)]) for b, c in zip(best, slots, strict=True)
            ]
            p0 = torch.stack([*near, *(y[4] for y in inside)]).softmax(0)
            o = p0[: n + 2] @ v[h, 25 : 25 + n + 2]
            for w, b, y in zip(p0[n + 2 :], best, inside, strict=True):
                o = o + w * (y[:4].softmax(0) @ v[h, b * size : b * size + 4])
            heads[h, n] = o
    return torch.cat(list(heads), -1) @ layer.out.weight.T


@check(
    "landmark-attention",
    "steps that open blocks equal a loop: choices a token and head, for all heads, for all tokens; places near, in front and true",
    below=1e-10,
    control="the other choice of blocks",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    x, own, other = torch.randn(1, 29, 16, dtype=F64), 0.0, math.inf
    for selection, places in (("token_and_head", "near"), ("heads", "true"), ("tokens", "front"), ("token_and_head", "front")):
        layer = LandmarkAttention(16, 2, block=4, top_blocks=2, selection=selection, places=places).double()
        _, cache = layer.step(x[:, :26])
        out, _ = layer.step(x[:, 26:], cache)
        own = max(own, naive.gap(out[0], opened_loop(layer, x, selection)))
        other = min(other, naive.gap(out[0], opened_loop(layer, x, "heads" if selection != "heads" else "token_and_head")))
    return own, other
