"""Attention written as an online function: tiles of scores in, rescaled outputs out; backward from a few numbers a row.

For each tile of keys: (P, state, o_scale) = online(S, state);  O = O o_scale + P V;  at the end (O, final) = epilogue(O, state)
backward: P = normalised(S, final), dV = P^T dO, dS = gradient(dO V^T, P, S, final, rowsum(dO O))
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..algebra.mask import Mask
from ..algebra.part import Sizes, call
from ..errors import RegardError
from .layout import some_and_every
from .pairs import indices, visible

Rows = dict[str, Tensor]


class OnlineFunction(Protocol):
    """What a user writes. masked: the score of a pair out of sight. state: row numbers and where they start; every tensor is (..., rows, 1)."""

    @property
    def masked(self) -> float: ...
    @property
    def state(self) -> Mapping[str, float]: ...
    def online(self, scores: Tensor, state: Rows) -> tuple[Tensor, Rows, Tensor | float]: ...
    def epilogue(self, out: Tensor, state: Rows) -> tuple[Tensor, Rows]: ...
    def normalised(self, scores: Tensor, final: Rows) -> Tensor: ...
    def gradient(self, dp: Tensor, p: Tensor, scores: Tensor, final: Rows, delta: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DeviceModel:
    """fast_bytes: memory a tile may fill (shared memory of a multiprocessor, cache of a core). least: smallest tile side the device likes."""

    name: str
    fast_bytes: int
    least: int = 16
    most: int = 256


DEVICES = {
    "cpu": DeviceModel("cpu", 1 << 20, 32, 512),
    "a100": DeviceModel("a100", 164 << 10),
    "h100": DeviceModel("h100", 228 << 10),
    "mi300": DeviceModel("mi300", 64 << 10),
}


@dataclass(frozen=True)
class Schedule:
    """Queries and keys a tile."""

    block_q: int
    block_k: int


def bytes_of(schedule: Schedule, head_dim: int, value_dim: int, width: int) -> int:
    q, k = schedule.block_q, schedule.block_k
    return width * (q * head_dim + k * (head_dim + value_dim)) + 4 * (q * k + q * value_dim)


def schedules(device: DeviceModel, head_dim: int, value_dim: int, width: int = 4) -> list[Schedule]:
    """The tiles that fit, the one with the most pairs a byte moved first."""
    sides = [side for side in (16, 32, 64, 128, 256, 512) if device.least <= side <= device.most]
    found = [Schedule(q, k) for q in sides for k in sides if bytes_of(Schedule(q, k), head_dim, value_dim, width) <= device.fast_bytes]
    if not found:
        raise RegardError(f"no tile of head_dim={head_dim}, value_dim={value_dim} fits {device.name}'s {device.fast_bytes} bytes")
    return sorted(found, key=lambda s: (-s.block_q * s.block_k / (s.block_q + s.block_k), -s.block_q))


def autotune(run: Callable[[Schedule], Any], candidates: Iterable[Schedule], repeats: int = 3) -> Schedule:
    """The candidate with the smallest median time."""
    times = {}
    for one in candidates:
        run(one)
        found = []
        for _ in range(repeats):
            begin = time.perf_counter()
            run(one)
            found.append(time.perf_counter() - begin)
        times[one] = statistics.median(found)
    return min(times, key=lambda one: times[one])


@dataclass(frozen=True, eq=False)
class Definition:
    """score: (s, and any of b, h, i, j, custom tensors by name) -> s, or None."""

    score: Callable[..., Tensor] | None
    mask: Mask
    online: OnlineFunction
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of a call: what each covers, and whether the mask shows none, some or all of it."""

    definition: Definition
    sizes: Sizes
    schedule: Schedule
    scale: float
    some: Tensor
    every: Tensor

    @classmethod
    def of(cls, definition: Definition, sizes: Sizes, schedule: Schedule, scale: float, device: torch.device) -> Tiles:
        some, every = some_and_every(definition.mask, sizes, schedule.block_q, schedule.block_k, {}, device)
        return cls(definition, sizes, schedule, scale, some, every)

    def rows(self) -> Iterable[tuple[int, slice]]:
        for n, start in enumerate(range(0, self.sizes.q_len, self.schedule.block_q)):
            yield n, slice(start, min(start + self.schedule.block_q, self.sizes.q_len))

    def columns(self, row: int) -> Iterable[tuple[bool, slice]]:
        """(whether all of it is visible, keys) of the tiles with anything to see."""
        for n, start in enumerate(range(0, self.sizes.k_len, self.schedule.block_k)):
            if bool(self.some[..., row, n].any()):
                yield bool(self.every[..., row, n].all()), slice(start, min(start + self.schedule.block_k, self.sizes.k_len))

    def scores(self, raw: Tensor, rows: slice, columns: slice, whole: bool, custom: Mapping[str, Tensor]) -> Tensor:
        """score_mod and mask of raw = q k^T scale."""
        at = indices(self.sizes, raw.device)
        place = {"b": at["b"], "h": at["h"], "i": at["i"][rows], "j": at["j"][columns]}
        s = raw if self.definition.score is None else call(self.definition.score, raw, env={**place, **custom})
        if whole:
            return s
        env = {"offset": self.sizes.k_len - self.sizes.q_len, "k_len": self.sizes.k_len}
        seen = visible(self.definition.mask, place["b"], place["h"], place["i"], place["j"], env)
        return torch.where(seen, s, self.definition.online.masked)


class Online(torch.autograd.Function):
    """Tiles forward, tiles backward; between them q, k, v, the output and a few numbers a row."""

    @staticmethod
    def forward(ctx: Any, tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, *custom: Tensor) -> Tensor:
        function, given = tiles.definition.online, dict(zip(tiles.definition.names, custom, strict=True))
        outs: list[Tensor] = []
        finals: list[Rows] = []
        for row, rows in tiles.rows():
            part = q[..., rows, :] * tiles.scale
            o = q.new_zeros(*part.shape[:-1], v.shape[-1])
            state = {name: torch.full_like(part[..., :1], value) for name, value in function.state.items()}
            for whole, columns in tiles.columns(row):
                s = tiles.scores(part @ k[..., columns, :].transpose(-1, -2), rows, columns, whole, given)
                p, state, factor = function.online(s, state)
                o = o * factor + p @ v[..., columns, :]
            out, final = function.epilogue(o, state)
            outs.append(out)
            finals.append(final)
        result = torch.cat(outs, -2)
        ctx.tiles, ctx.finals = tiles, finals
        ctx.save_for_backward(q, k, v, result, *custom)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tiles: Tiles = ctx.tiles
        q, k, v, out, *custom = ctx.saved_tensors
        function, names = tiles.definition.online, tiles.definition.names
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        extra = [torch.zeros_like(x) for x in custom]
        delta = (grads[0] * out).sum(-1, keepdim=True)
        for row, rows in tiles.rows():
            part, do, final = q[..., rows, :] * tiles.scale, grads[0][..., rows, :], ctx.finals[row]
            for whole, columns in tiles.columns(row):
                keys, values = k[..., columns, :], v[..., columns, :]
                with torch.enable_grad():
                    raw = (part @ keys.transpose(-1, -2)).requires_grad_()
                    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in custom]
                    s = tiles.scores(raw, rows, columns, whole, dict(zip(names, leaves, strict=True)))
                p = function.normalised(s.detach(), final)
                ds = function.gradient(do @ values.transpose(-1, -2), p, s.detach(), final, delta[..., rows, :])
                wanted = [raw, *[x for x in leaves if x.requires_grad]]
                found = iter(torch.autograd.grad(s, wanted, ds, allow_unused=True)) if s.requires_grad else iter([None] * len(wanted))
                d_raw = next(found)
                for at, leaf in enumerate(leaves):
                    g = next(found) if leaf.requires_grad else None
                    if g is not None:
                        extra[at] += g
                dv[..., columns, :] += p.transpose(-1, -2) @ do
                if d_raw is not None:
                    dq[..., rows, :] += d_raw @ keys * tiles.scale
                    dk[..., columns, :] += d_raw.transpose(-1, -2) @ part
        return (None, dq, dk, dv, *[g if x.is_floating_point() else None for g, x in zip(extra, custom, strict=True)])


def whole(definition: Definition, sizes: Sizes, q: Tensor, k: Tensor, v: Tensor, scale: float, custom: Mapping[str, Tensor]) -> Tensor:
    """The same in one tile and under autograd: the reference."""
    tiles = Tiles.of(definition, sizes, Schedule(sizes.q_len, sizes.k_len), scale, q.device)
    function = definition.online
    state = {name: torch.full_like(q[..., :1], value) for name, value in function.state.items()}
    s = tiles.scores(q * scale @ k.transpose(-1, -2), slice(0, sizes.q_len), slice(0, sizes.k_len), False, custom)
    p, state, _ = function.online(s, state)
    return function.epilogue(p @ v, state)[0]
