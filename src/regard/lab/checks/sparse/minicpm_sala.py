"""Checks of minicpm-sala."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal, Recurrent
from regard.engine import step
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import selection_of
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.nn.decoder import Decoder
from regard.zoo.sparse.minicpm_sala import (
    SALAConfig,
    build_sala,
    convert,
    distil_loss,
    infllm,
    infllm_scores,
    sala_lightning,
    softmax_layers,
    train_stages,
)

SMALL = SALAConfig(vocab=40, dim=32, layers=8, heads=4, kv_heads=2, block_size=8, top_k=2, window=8, dense_len=0, kernel=4, stride=2)


@check("minicpm-sala", "lightning: chunks and steps equal the quadratic form", below=1e-10, control="slopes of layer 0 in layer 3")
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(2, 4, 90, 8, dtype=F64) for _ in range(3))
    mechanism = sala_lightning(3, 8)
    truth = attend(q, k, v, mechanism, executor="parallel")
    state, outs = None, []
    for t in range(90):
        out, state = step(*(x[:, :, t : t + 1] for x in (q, k, v)), mechanism, state)
        outs.append(out)
    own = max(naive.gap(attend(q, k, v, mechanism, executor="chunk"), truth), naive.gap(torch.cat(outs, 2), truth))
    return own, naive.gap(attend(q, k, v, sala_lightning(0, 8)), truth)


@check(
    "minicpm-sala",
    "block scores (windows 32 / 16, blocks of 64) equal a loop, and all blocks are dense attention without positions",
    below=1e-10,
    control="sums over touching windows instead of maxima",
)
def _() -> tuple[float, float]:
    q, k, v = torch.randn(1, 4, 300, 8, dtype=F64), *torch.randn(2, 1, 2, 300, 8, dtype=F64)
    found, own, other = infllm_scores(q, k, 0, 64), 0.0, 0.0
    for h in range(2):
        for i in range(0, 300, 7):
            ready = [m for m in range((300 - 32) // 16 + 1) if m * 16 + 31 <= i]
            mass = torch.zeros((300 - 32) // 16 + 1, dtype=F64)
            for g in (2 * h, 2 * h + 1):
                if ready:
                    mass[ready] += torch.stack([q[0, g, i] @ k[0, h, m * 16 : m * 16 + 32].mean(0) for m in ready]).softmax(0)
            for b in range(5):
                touching = [float(mass[m]) for m in range(len(mass)) if m * 16 < (b + 1) * 64 and m * 16 + 32 > b * 64]
                own = max(own, abs(float(found[0, h, i, b]) - max(touching)))
                other = max(other, abs(float(found[0, h, i, b]) - sum(touching)))
    dense = attend(q, k, v, infllm(top_k=5, window=64, dense_len=0))
    return own + naive.gap(dense, attend(q, k, v, mask=Causal())), other


@check(
    "minicpm-sala",
    "each query reads the first block, its local ones and the best others, the same for a group: differing rows",
    below=0,
    control="local blocks scored with the others",
)
def _() -> tuple[float, float]:
    q, k = torch.randn(1, 4, 96, 8, dtype=F64), torch.randn(1, 2, 96, 8, dtype=F64)
    keep = selection_of(infllm(8, 3, 16, 0, 4, 2).select, q, k).keep
    scores, wrong = infllm_scores(q * 8**-0.5, k, 0, 8, 4, 2), [0, 0]
    for h in range(4):
        for i in range(96):
            own = i // 8
            for n, local in enumerate(((own, own - 1), ())):
                past = sorted((b for b in range(1, own + 1) if b not in local), key=lambda b: (-float(scores[0, h // 2, i, b]), b))
                truth = {b for b in local if b >= 0} | {0} | set(past[: 2 if 0 not in local else 3])
                wrong[n] += truth != set(keep[0, h, i].nonzero().flatten().tolist())
    return float(wrong[0]), float(wrong[1])


@check(
    "minicpm-sala",
    "decoding equals the forward pass, linear layers' bytes do not grow",
    below=1e-9,
    control="growth of the sparse layers' bytes",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, tokens = build_sala(SMALL).double(), torch.randint(40, (2, 60))
    whole, (first, states) = model(tokens), model.step(tokens[:, :30])
    held, outs = [state.bytes for state in states], [first]
    for t in range(30, 60):
        out, states = model.step(tokens[:, t : t + 1], states)
        outs.append(out)
    growth = [state.bytes - old for state, old in zip(states, held, strict=True)]
    kept = softmax_layers(8)
    linear = sum(growth[n] for n in range(8) if n not in kept)
    return naive.gap(torch.cat(outs, 1), whole) + linear, float(min(growth[n] for n in kept))


@check(
    "minicpm-sala",
    "positions: permuting the past leaves the last row of a sparse layer that reads all unchanged",
    below=1e-12,
    control="a linear layer",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    x, gaps = torch.randn(1, 40, 32, dtype=F64), []
    order = torch.cat((torch.randperm(39), torch.tensor([39])))
    for mechanism in (infllm(dense_len=64), sala_lightning()):
        layer = Attention(32, 4, mechanism, kv_heads=2, rope=True).double()
        gaps.append(naive.gap(layer(x[:, order])[:, -1], layer(x)[:, -1]))
    return gaps[0], gaps[1]


@check(
    "minicpm-sala",
    "1 : 3 of 8 layers: 2 softmax layers, first and last among them, projections copied to the bit: exceptions",
    below=0,
    control="a model built without the dense one",
)
def _() -> tuple[float, float]:
    dense = Decoder("softmax", vocab=40, dim=32, layers=8, heads=4, kv_heads=2)
    wrong = []
    for model in (convert(dense, SMALL), build_sala(SMALL)):
        kept = [n for n, b in enumerate(model.blocks) if not isinstance(b.mixer.mechanism, Recurrent)]  # type: ignore[union-attr]
        count = int(kept != [0, 7])
        for new, old in zip(model.blocks, dense.blocks, strict=True):
            for name in ("q", "k", "v", "out"):
                a: Tensor = getattr(new.mixer, name).weight
                count += not torch.equal(a, getattr(old.mixer, name).weight)
        wrong.append(float(count))
    scored = softmax_layers(8, 0.5, [0, 1, 5, 2, 9, 3, 1, 0])
    return wrong[0] + (scored != (0, 2, 4, 7)), wrong[1]


@check(
    "minicpm-sala",
    "a toy conversion, 40 steps of alignment and 40 of distillation: the KL to the dense model, after over before",
    below=0.5,
    control="the same steps for a model without the dense one's weights",
)
def _() -> tuple[float, float]:
    dense = Decoder("softmax", vocab=24, dim=32, layers=4, heads=4, kv_heads=2)
    with torch.no_grad():
        dense.embed.weight.mul_(10)
    config = SALAConfig(vocab=24, dim=32, layers=4, heads=4, kv_heads=2, share=0.5)

    def batches(step: int) -> Tensor:
        return torch.randint(24, (8, 32), generator=torch.Generator().manual_seed(step))

    def left(model: Decoder) -> float:
        with torch.no_grad():
            return float(distil_loss(model, dense, batches(999)))

    before, found = left(convert(dense, config)), []
    for model in (convert(dense, config), build_sala(config)):
        log = train_stages(model, dense, batches, (40, 40), 3e-3)
        assert math.isfinite(log["align"][-1])
        found.append(left(model) / before)
    return found[0], found[1]
