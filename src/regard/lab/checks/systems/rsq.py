"""Checks of rsq."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import models
from regard.adapt.gptq import Grid, gptq
from regard.adapt.rotation import fold_norms, hadamard, rotate_stream, rotation_of
from regard.lab import naive
from regard.lab.checks.shared.byhand import rms
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.converting import begun, corpus, heads_by_hand, tiny_bits
from regard.lab.checks.shared.decoding import llama
from regard.lab.verification import check
from regard.zoo.systems.rsq import Text, chunks, rsq_quantize, scaled


def uneven() -> Any:
    """A small Llama whose norms have gains, and whose output layer is its embedding."""
    model = llama()
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data = 1 + 0.5 * torch.randn_like(p)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    """In float64 throughout; transformers computes norms in float32."""
    rows = []
    for row in ids:
        x = model.model.embed_tokens(row)
        for layer in model.model.layers:
            x = forward(layer, x)[-1]
        rows.append(rms(x, model.model.norm.weight, model.model.norm.variance_epsilon) @ model.lm_head.weight.T)
    return torch.stack(rows)


@check(
    "rsq",
    "norms folded, stream rotated (Hadamard of 32, and drawn): gap of a tied Llama's logits to its own, plus H H^T - n I for n = 1, 2, 12, 28, 36, 60",
    below=1e-9,
    control="rotated with the gains left where they are",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids, own, other = uneven(), torch.randint(50, (2, 9)), 0.0, math.inf
    truth = logits(model, ids)
    for kind in ("hadamard", "orthogonal"):
        r = rotation_of(32, kind, torch.Generator().manual_seed(1))
        turned, wrong = copy.deepcopy(model), copy.deepcopy(model)
        fold_norms(turned)
        rotate_stream(turned, r)
        wrong.lm_head.weight = torch.nn.Parameter(wrong.lm_head.weight.clone())
        rotate_stream(wrong, r)
        own = max(own, naive.gap(logits(turned, ids), truth))
        other = min(other, naive.gap(logits(wrong, ids), truth))
    for n in (1, 2, 12, 28, 36, 60):
        h = hadamard(n)
        own = max(own, naive.gap(h @ h.T, n * torch.eye(n, dtype=F64)), float((h.abs() - 1).abs().max()))
    return own, other


@check(
    "rsq", "one channel 50 times the others: largest entry over the root mean square, after the rotation", below=6.0, control="not rotated"
)
def _() -> tuple[float, float]:
    x = torch.randn(64, 512, dtype=F64)
    x[:, 7] *= 50
    r = rotation_of(512, "hadamard", torch.Generator().manual_seed(0))

    def ratio(x: Tensor) -> float:
        return float((x.abs().amax(1) / x.square().mean(1).sqrt()).max())

    return ratio(x @ r), ratio(x)


def on_grid(w: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The scale and zero of one row, by trying them."""
    low, high = min(0.0, float(w.min())), max(0.0, float(w.max()))
    if grid.symmetric:
        low, high = -max(-low, high, 1e-5), max(-low, high, 1e-5)
    best: tuple[float, float, float] = (math.inf, 0.0, 0.0)
    for i in range(int(grid.shrink * grid.steps) if grid.clip else 1):
        p = 1 - i / grid.steps
        scale = p * high / grid.top if grid.symmetric else p * (high - low) / grid.top
        zero = 0.0 if grid.symmetric else round(-p * low / scale)
        error = float((nearest(w, scale, zero, grid) - w).abs().pow(grid.norm).sum())
        best = min(best, (error, scale, zero), key=lambda t: t[0])
    return torch.tensor(best[1], dtype=F64), torch.tensor(best[2], dtype=F64)


def nearest(w: Tensor, scale: Any, zero: Any, grid: Grid) -> Tensor:
    levels = torch.arange(-grid.top - 1, grid.top + 1) if grid.symmetric else torch.arange(0, grid.top + 1)
    values = (levels.to(F64) - zero) * scale
    return values[(w[..., None] - values).abs().argmin(-1)]


def by_elimination(weight: Tensor, gram: Tensor, grid: Grid, damp: float, block: int, order: bool) -> Tensor:
    """GPTQ as it is derived: a column is rounded, the others take the best step given that, the column is struck from the quadratic form."""
    w, h = weight.clone(), gram.clone()
    first = [on_grid(row, grid) for row in w]
    dead = h.diagonal() == 0
    h[dead, dead], w[:, dead] = 1, 0
    turn = h.diagonal().argsort(descending=True) if order else torch.arange(len(h))
    w, h = w[:, turn], h[turn][:, turn]
    h = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=F64)
    out, scales = w.clone(), first
    for c in range(len(h)):
        if c % block == 0:
            settled = w.clone()
        if grid.group is not None and c % grid.group == 0:
            # Columns of later blocks wait for this block's errors, which `settled` does not hold either.
            scales = [on_grid(row, grid) for row in settled[:, c : c + grid.group]]
        inverse = torch.linalg.inv(h[c:, c:])
        for row in range(len(w)):
            out[row, c] = nearest(w[row, c], *scales[row], grid)
            w[row, c:] -= (w[row, c] - out[row, c]) / inverse[0, 0] * inverse[0]
    back = torch.empty_like(out)
    back[:, turn] = out
    return back


@check(
    "rsq",
    "GPTQ (3 and 2 bits, with zeros, without clipping, in groups, in order, a channel that never occurs) equals rounding by elimination",
    below=1e-9,
    control="rounding to the nearest",
)
def _() -> tuple[float, float]:
    own, other = 0.0, math.inf
    for options, how in (
        ({}, {}),
        ({"bits": 2, "clip": False}, {"block": 3, "damp": 0.1}),
        ({"symmetric": False, "norm": 2.0, "steps": 20, "shrink": 0.5}, {"order": True}),
        ({"bits": 4, "group": 4}, {"block": 8}),
        ({"bits": 4, "group": 2, "symmetric": False}, {"block": 4}),
    ):
        x = torch.randn(40, 12, dtype=F64) @ torch.randn(12, 12, dtype=F64)
        x[:, 5] = 0
        w, gram, grid = torch.randn(5, 12, dtype=F64), x.T @ x, Grid(**options)
        given = {"damp": 0.01, "block": 128, "order": False, **how}
        found, truth = gptq(w, gram, grid, **given), by_elimination(w, gram, grid, **given)
        own = max(own, naive.gap(found.weight, truth))
        other = min(other, naive.gap(torch.stack([nearest(row, *on_grid(row, grid), grid) for row in w]), truth))
        groups = 1 if grid.group is None else 12 // grid.group
        assert found.scales.shape[1] == groups or grid.group is None
    return own, other


def by_hand(name: str, text: Text) -> Tensor:
    """Importance of each token, in loops."""
    layer, x, y = text.layer, text.x, text.y
    if name == "actnorm":
        return torch.stack([row.square().sum().sqrt() for row in x])
    if name == "actdiff":
        return -torch.stack([(a - b).square().sum().sqrt() for a, b in zip(x, y, strict=True)])
    if name == "tokenfreq":
        return -text.counts.to(F64)
    if name == "tokensim":
        return torch.stack([torch.stack([(a - b).square().sum() for b in x]).mean() for a in x])
    heads = heads_by_hand(layer.self_attn, rms(x, layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon)[None])
    r = torch.zeros(len(x), dtype=F64)
    for h in range(heads.q.shape[1]):
        for i in range(len(x)):
            r[: i + 1] += naive.softmax(heads.turned_k[0, h, : i + 1] @ heads.turned_q[0, h, i] / math.sqrt(heads.q.shape[3]))
    return r


def pipeline(model: Any, ids: Tensor, name: str, low: float, exponent: float) -> dict[str, Tensor]:
    """All rounded weights: the layers' inputs written out, each group of linear layers on what the rounded ones before it give."""
    model = copy.deepcopy(model)
    streams = [model.model.embed_tokens(row) for row in ids]
    done = {}
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        weights = []
        for row, x in zip(ids, streams, strict=True):
            counts = torch.tensor([int((ids == t).sum()) for t in row])
            y = forward(layer, x)[-1]
            r = by_hand(name, Text(layer, x, y, counts, {}))
            r = low + (1 - low) * (r - r.min()) / (r.max() - r.min())
            weights.append(r * len(r) / r.sum())
        parts = (
            ("self_attn.k_proj", attention.k_proj, 0),
            ("self_attn.v_proj", attention.v_proj, 0),
            ("self_attn.q_proj", attention.q_proj, 0),
            ("self_attn.o_proj", attention.o_proj, 1),
            ("mlp.up_proj", mlp.up_proj, 2),
            ("mlp.gate_proj", mlp.gate_proj, 2),
            ("mlp.down_proj", mlp.down_proj, 3),
        )
        inputs = None
        for at, (key, linear, stage) in enumerate(parts):
            if at == 0 or parts[at - 1][2] != stage:
                inputs = [forward(layer, x)[stage] for x in streams]
            gram = 2 / len(ids) * sum((z * (r ** (2 * exponent))[:, None]).T @ z for z, r in zip(inputs, weights, strict=True))
            linear.weight.copy_(gptq(linear.weight, gram, Grid(3)).weight)
            done[f"layers.{number}.{key}"] = linear.weight.clone()
        streams = [forward(layer, x)[-1] for x in streams]
    return done


def forward(layer: Any, x: Tensor) -> list[Tensor]:
    """What q, k, v read; what o reads; what the MLP reads; what its second layer reads; the layer's output."""
    a = rms(x, layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon)
    h = heads_by_hand(layer.self_attn, a[None])
    s = (h.turned_q @ h.turned_k.mT / math.sqrt(h.q.shape[3])).masked_fill(torch.ones(len(x), len(x), dtype=torch.bool).triu(1), -math.inf)
    o = (s.softmax(-1) @ h.v)[0].transpose(0, 1).flatten(1)
    z = x + o @ layer.self_attn.o_proj.weight.T
    b = rms(z, layer.post_attention_layernorm.weight, layer.post_attention_layernorm.variance_epsilon)
    c = F.silu(b @ layer.mlp.gate_proj.weight.T) * (b @ layer.mlp.up_proj.weight.T)
    return [a, o, b, c, z + c @ layer.mlp.down_proj.weight.T]


@check(
    "rsq",
    "two layers, each importance, exponents 1/2 and 1: rounded weights equal those from inputs and importances written out (GPTQ held above)",
    below=1e-6,
    control="importance computed and forgotten",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids, own, other = uneven(), torch.randint(50, (3, 11)), 0.0, math.inf
    folded = copy.deepcopy(model)
    fold_norms(folded)
    for name, low, exponent in (
        ("attncon", 0.005, 0.5),
        ("attncon", 0.1, 1.0),
        ("actnorm", 0.05, 0.5),
        ("actdiff", 0.02, 0.5),
        ("tokenfreq", 0.3, 0.5),
        ("tokensim", 0.05, 0.5),
    ):
        found = rsq_quantize(model, ids, 3, name, low=low, exponent=exponent, rotation="none").layers
        truth = pipeline(folded, ids, name, low, exponent)
        own = max(own, max(naive.gap(found[key].weight, truth[key]) for key in truth | found))
        plain = rsq_quantize(model, ids, 3, "uniform", rotation="none").layers
        other = min(other, max(naive.gap(plain[key].weight, truth[key]) for key in truth))
    return own, other


@check(
    "rsq",
    "equal importance, whatever its size, and of halves of a text both: weights of plain GPTQ, bit for bit",
    below=0.0,
    control="the first half alone",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = uneven(), torch.randint(50, (2, 12))
    truth = rsq_quantize(model, ids, 3, "uniform").layers

    def gap(importance: Any) -> float:
        found = rsq_quantize(model, ids, 3, importance).layers
        return max(naive.gap(found[key].weight, truth[key].weight) for key in truth)

    return max(gap(lambda text: torch.full((12,), 8.0, dtype=F64)), gap(chunks((0, 1), 2))), gap(chunks((0,), 2))


@check(
    "rsq",
    "16 important tokens of 256, of another covariance, 3 bits: their squared error over unweighted GPTQ's, worst of 10 draws",
    below=0.5,
    control="importance of 1 for all",
)
def _() -> tuple[float, float]:
    worst = []
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(256, 64, generator=g, dtype=F64) @ torch.randn(64, 64, generator=g, dtype=F64)
        x[:16] = torch.randn(16, 64, generator=g, dtype=F64) @ torch.randn(64, 64, generator=g, dtype=F64)
        w = torch.randn(32, 64, generator=g, dtype=F64)
        seen = torch.arange(256) < 16
        r = scaled(seen.to(F64), 0.005, 1.0)

        def error(r: Tensor, x: Tensor = x, w: Tensor = w) -> float:
            q = gptq(w, 2 * (x * (r * 256 / r.sum())[:, None]).T @ x, Grid(3)).weight
            return float(((q - w) @ x[:16].T).square().sum())

        plain = error(torch.ones(256, dtype=F64))
        worst.append((error(r) / plain, error(scaled(torch.ones(256, dtype=F64), 0.005, 1.0)) / plain))
    return max(a for a, _ in worst), min(b for _, b in worst)


@check(
    "rsq",
    "the tiny model at 2 bits from 6 texts of 64 bytes: bits per byte of held-out text beyond its own",
    below=1.6,
    control="rounding to the nearest, no rotation",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model = models.load("tiny")
    own, ids = tiny_bits(model), begun(corpus().batch(6, 63, torch.Generator().manual_seed(0)))
    found = tiny_bits(rsq_quantize(model, ids, 2).model) - own
    grid = Grid(2)
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear) and name.endswith("_proj"):
            part.weight.copy_(grid.round(part.weight, *grid.fit(part.weight)))
    return found, tiny_bits(model) - own
