"""HyLRA: some layers find the keys that matter, the layers after them read only those; a plan by dynamic programming (id 222; 2026).

J[l, Full] = min_b J[l-1, b] + lambda c_F;  J[l, a] = J[l-1, a] + e[a, l] + lambda c_R, a: the last full layer;  layer 0 is full
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from regard.algebra.blocks import heads_of, top_k
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.engine.policy import Heads, Policy
from regard.errors import RegardError
from regard.nn.attention import Attention
from regard.nn.decoder import Block, Decoder


@dataclass(frozen=True, eq=False)
class Profile:
    """overlap, mass, error (L, L): of reading layer a's keys in layer l (rows a); sensitivity (L,): the error of a layer's own top keys."""

    overlap: Tensor
    mass: Tensor
    error: Tensor
    sensitivity: Tensor


@dataclass(frozen=True)
class ReusePlan:
    """modes: for each layer None (full) or the layer whose keys it reads; cost: the sum the plan minimises."""

    modes: tuple[int | None, ...]
    cost: float

    @property
    def full_layers(self) -> list[int]:
        return [at for at, mode in enumerate(self.modes) if mode is None]


def causal_weights(q: Tensor, k: Tensor) -> Tensor:
    s = q @ heads_of(k, q.shape[1]).transpose(-1, -2) * q.shape[-1] ** -0.5
    seen = torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[-2] - q.shape[-2])
    return s.masked_fill(~seen, -math.inf).softmax(-1)


def largest(p: Tensor, kv_heads: int, count: int, first: int = 0) -> Tensor:
    """(B, Hkv, Lq, Lk) bool: the `count` keys of most weight, summed over the heads of a group; never one after the query."""
    grouped = p.unflatten(1, (kv_heads, -1)).sum(2)
    at = torch.arange(first, first + p.shape[-2], device=p.device)[:, None]
    return top_k(grouped, torch.arange(p.shape[-1], device=p.device) <= at, count)


def profile(layers: Sequence[Heads], count: int) -> Profile:
    """Of layers' q, k, v (B, H or Hkv, L, D) on calibration prompts; rows with at most `count` keys in sight are left out."""
    total, rows = len(layers), slice(count, None)
    p = [causal_weights(q, k)[:, :, rows] for q, k, _ in layers]
    tops = [largest(p[n], layers[n][1].shape[1], count, count) for n in range(total)]
    full = [p[n] @ heads_of(layers[n][2], p[n].shape[1]) for n in range(total)]
    overlap, mass, error = (torch.zeros(total, total, dtype=torch.float64) for _ in range(3))
    for a in range(total):
        for n in range(a, total):
            kept = tops[a].repeat_interleave(p[n].shape[1] // tops[a].shape[1], 1)
            weight = (p[n] * kept).sum(-1, keepdim=True)
            sparse = (p[n] * kept / weight.clamp_min(1e-30)) @ heads_of(layers[n][2], p[n].shape[1])
            overlap[a, n] = (tops[a] & tops[n]).sum(-1).double().mean() / count
            mass[a, n] = weight.mean()
            error[a, n] = ((sparse - full[n]).norm(dim=-1) / full[n].norm(dim=-1).clamp_min(1e-30)).mean()
    return Profile(overlap, mass, error, error.diagonal().clone())


def plan(
    error: Tensor, sensitivity: Tensor | None = None, *, weight: float = 0.1, full_cost: float = 1.0, reuse_cost: float = 0.1,
    threshold: float = math.inf,
) -> ReusePlan:  # fmt: skip
    """The cheapest modes for e[a, l]: weight is lambda; layers of a sensitivity over `threshold` are full."""
    total = error.shape[0]
    forced = [sensitivity is not None and float(sensitivity[n]) > threshold for n in range(total)]
    costs: dict[int, tuple[float, tuple[int | None, ...]]] = {0: (weight * full_cost, (None,))}  # by the last full layer
    for n in range(1, total):
        best = min(costs.values(), key=lambda found: found[0])
        after = {n: (best[0] + weight * full_cost, (*best[1], None))}
        if not forced[n]:
            for a, (cost, modes) in costs.items():
                after[a] = (cost + float(error[a, n]) + weight * reuse_cost, (*modes, a))
        costs = after
    cost, modes = min(costs.values(), key=lambda found: found[0])
    return ReusePlan(modes, cost)


def top_indices(p: Tensor, kv_heads: int, count: int, sinks: int = 4, recent: int = 16) -> Tensor:
    """(B, Hkv, min(count, Lk)), ascending: the keys of most weight over the rows of p (B, H, n, Lk), first and last ones always among them."""
    mass = p.sum(-2).unflatten(1, (kv_heads, -1)).sum(2)
    length = mass.shape[-1]
    mass[..., : min(sinks, count // 4)] = math.inf
    mass[..., length - min(recent, max(1, count // 2)) :] = math.inf
    return mass.topk(min(count, length), -1).indices.sort(-1).values


@dataclass
class ReuseState:
    """Keys and values of every layer so far (all are stored, reuse layers too)."""

    layers: list[tuple[Tensor, Tensor]]

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0


class ReuseLayers(Policy):
    """Layers by a `ReusePlan`: full layers choose `count` keys, reuse layers read those.

    Prompts run in blocks of `block` queries that share their keys; a block's own tokens come on top of the count. modes: None has the plan
    made by `calibrate`, with `weight` as its lambda. `.reads`: keys read by each layer for the last query.
    """

    def __init__(
        self, modes: ReusePlan | None, count: int, *, block: int = 64, sinks: int = 4, recent: int = 16, weight: float = 0.1,
    ):  # fmt: skip
        if count < 1 or (modes is not None and modes.modes[0] is not None):
            raise RegardError(f"count={count}, modes={modes}: expected a positive count, and a full first layer")
        self.keys, self.block, self.sinks, self.recent, self.weight = count, block, sinks, recent, weight
        self.modes: tuple[int | None, ...] = () if modes is None else modes.modes
        self.reads = [0] * len(self.modes)
        self.indices: dict[tuple[int, int], Tensor] = {}

    def calibrate(self, layers: Sequence[Heads]) -> None:
        if not self.modes:
            found = profile(layers, min(self.keys, layers[0][0].shape[2] - 1))
            self.modes = plan(found.error, found.sensitivity, weight=self.weight).modes
            self.reads = [0] * len(self.modes)

    def prompt(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.modes:
            raise RegardError("modes=None: expected a plan, or `calibrate` before the first prompt")
        if layer == 0:
            self.indices = {}
        return self.layer(layer, q, k, v, 0, self.indices)

    def chosen(self, p: Tensor, kv_heads: int) -> Tensor:
        return top_indices(p, kv_heads, self.keys, self.sinks, self.recent)

    def layer(self, number: int, q: Tensor, k: Tensor, v: Tensor, first: int, indices: dict[tuple[int, int], Tensor]) -> Tensor:
        """One layer's heads; full layers leave each block's keys in `indices`, reuse layers take them from there."""
        outs, mode = [], self.modes[number]
        for start in range(0, q.shape[2], self.block):
            part = q[:, :, start : start + self.block]
            stop = first + start + part.shape[2]
            keys, values = k[:, :, :stop], v[:, :, :stop]
            if mode is None:
                p = causal_weights(part, keys)
                at = torch.arange(stop, device=q.device)
                self.count(at <= at[first + start :, None], q.shape[0] * q.shape[1])
                own = torch.arange(first + start, stop - 1, device=q.device).expand(*k.shape[:2], -1)
                found = self.chosen(p, k.shape[1])
                indices[number, start] = torch.cat((found, own), -1).sort(-1).values if part.shape[2] > 1 else found
                outs.append(p @ heads_of(values, q.shape[1]))
                self.reads[number] = stop
            else:
                index = indices[mode, start]
                index = torch.where(index.diff(dim=-1, prepend=index[..., :1] - 1) == 0, stop, index)  # each key once
                real = index < stop
                picked = index.clamp(max=stop - 1)
                at = torch.arange(first + start, stop, device=q.device)[:, None]
                gathered = [x.gather(2, picked[..., None].expand(*picked.shape, x.shape[-1])) for x in (keys, values)]
                seen = (real[:, :, None] & (picked[:, :, None] <= at)).repeat_interleave(q.shape[1] // k.shape[1], 1)
                outs.append(attend(part, gathered[0], gathered[1], mask=seen))
                self.reads[number] = int(real.sum(-1).max())
        return torch.cat(outs, 2)


@register("hylra", kind="policy")
class ReusedIndices:
    """A `Decoder` of softmax layers run by a `ReusePlan`, prompts and single tokens; the options are those of `ReuseLayers`."""

    def __init__(self, model: Decoder, modes: ReusePlan, count: int, **options: Any):
        layers = [block.mixer for block in model.blocks]
        if len(modes.modes) != len(layers) or any(type(layer) is not Attention for layer in layers):
            raise RegardError(f"{len(modes.modes)} modes for {len(layers)} layers; expected one for each Attention layer of the model")
        self.model, self.policy = model, ReuseLayers(modes, count, **options)

    @property
    def reads(self) -> list[int]:
        return self.policy.reads

    def step(self, tokens: Tensor, state: ReuseState | None = None) -> tuple[Tensor, ReuseState]:
        """tokens (B, n) after those in `state` -> (logits (B, n, vocab), new state)."""
        x, first = self.model.embed(tokens), 0 if state is None else state.length
        indices: dict[tuple[int, int], Tensor] = {}
        kept: list[tuple[Tensor, Tensor]] = []
        for number, block in enumerate(cast(list[Block], list(self.model.blocks))):
            layer, y = cast(Attention, block.mixer), block.norm1(x)
            q, k, v, _ = layer.heads_of(y, y, first, None)
            if state is not None:
                k, v = (torch.cat((old, new), 2) for old, new in zip(state.layers[number], (k, v), strict=True))
            kept.append((k, v))
            x = x + block.scale1(layer.close(self.policy.layer(number, q, k, v, first, indices), y))
            x = x + block.scale2(block.mlp(block.norm2(x)))
        return self.model.logits(x), ReuseState(kept)

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.step(tokens)[0]


def captured(model: Decoder, tokens: Tensor) -> list[Heads]:
    """q, k, v of every layer of a decoder of `Attention` layers on tokens (B, L), what `profile` reads."""
    found, x = [], model.embed(tokens)
    for block in cast(list[Block], list(model.blocks)):
        layer, y = cast(Attention, block.mixer), block.norm1(x)
        found.append(layer.heads_of(y, y, 0, None)[:3])
        x = block(x)
    return found
