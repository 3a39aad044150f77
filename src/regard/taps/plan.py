"""What taps would keep and cost, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import RegardError
from ..nn.attention import Attention
from .points import MAPS, STREAM
from .reductions import ColumnMass, Pooled, Reduction, Top
from .session import Point, Taps, read
from .site import Site
from .station import CHUNK, Tap


@dataclass(frozen=True)
class Line:
    """A point in all its layers: layers that are tapped, bytes that are kept, floating-point operations beside the model's own."""

    point: str
    layers: int
    bytes: int
    flops: int


@dataclass(frozen=True)
class TapPlan:
    """lines: by point. work: bytes at most held for a moment besides (a piece of a map). forward: operations of the untapped model."""

    lines: tuple[Line, ...]
    work: int
    forward: int

    @property
    def bytes(self) -> int:
        return sum(line.bytes for line in self.lines)

    @property
    def flops(self) -> int:
        return sum(line.flops for line in self.lines)

    @property
    def share(self) -> float:
        """Extra operations over the model's: about how much longer the forward pass takes."""
        return self.flops / self.forward

    def __str__(self) -> str:
        rows = [
            f"{one.point:14} {one.layers:3} layers  {one.bytes / 2**20:9.1f} MB kept  {one.flops / 1e9:9.2f} GFLOP more"
            for one in self.lines
        ]
        return "\n".join(
            [
                *rows,
                f"{'together':14}             {self.bytes / 2**20:9.1f} MB kept  {self.work / 2**20:.1f} MB at work  {self.share:.1%} more operations than the model's",
            ]
        )


def widths(site: Site) -> tuple[int, int, int]:
    """(channels of a head's query and key, of its value, of the stream)."""
    if isinstance(site.module, Attention):
        return site.module.key_dim, site.module.value_dim, site.module.dim
    weight = getattr(site.stream.projection, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise RegardError(
            f"{type(site.module).__name__} in layer {site.layer} has no output projection known by name, so its sizes are not known; expected one"
        )
    inner, dim = (weight.shape[1], weight.shape[0]) if isinstance(site.stream.projection, nn.Linear) else tuple(weight.shape)
    return inner // site.heads, inner // site.heads, dim


def plan(
    model: nn.Module,
    points: Point | Iterable[Point],
    *,
    length: int,
    batch: int = 1,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
) -> TapPlan:
    """What `read` with the same points would keep in one call of `batch` rows of `length` tokens without a cache. RegardError as `read` raises."""
    if length < 1 or batch < 1:
        raise RegardError(f"length={length}, batch={batch}; expected 1 or more")
    asked: Taps = read(model, points, layers=layers, heads=heads, positions=positions)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    size, wide = dtype.itemsize, max(4, dtype.itemsize)
    total: dict[str, list[int]] = {}
    work = 0
    for site, tap in zip(asked.sites, asked.taps, strict=True):
        d, dv, dim = widths(site)
        count = site.heads if tap.heads is None else len(tap.heads)
        kv = site.kv_heads if tap.key_heads is None else len(tap.key_heads)
        rows = len(tap.places.rows(length, 0))
        entries = {"q": count * rows * d, "k": kv * rows * d, "v": kv * rows * dv, "heads": count * rows * dv}
        entries |= {"q_pre_rotary": entries["q"], "k_pre_rotary": entries["k"]}
        entries |= dict.fromkeys(STREAM, rows * dim) | dict.fromkeys(MAPS, count * rows * length)
        scores = 2 * batch * count * rows * length * d
        first = next((p for p in (*tap.reads, *tap.reductions) if isinstance(p, Reduction) or p in MAPS), None)
        every: list[Point] = [*tap.reads, *tap.reductions]
        for point in every:
            name = point.name if isinstance(point, Reduction) else point
            kept = (
                reduced(point, count, rows, length, wide)
                if isinstance(point, Reduction)
                else entries[point] * (wide if point in MAPS else size)
            )
            found = total.setdefault(name, [0, 0, 0])
            more = scores + 5 * batch * count * rows * length if point is first else 0  # maps are made once for all that read them
            for at, x in enumerate((1, batch * kept, more)):
                found[at] += x
        work = max(work, held(tap, batch * count * rows * length, batch * count * length) * wide)
    known = {site.layer: widths(site)[0] * site.heads for site in asked.sites}
    attention = sum(4 * batch * length**2 * w for w in known.values())
    forward = 2 * batch * length * sum(p.numel() for p in model.parameters()) + attention
    return TapPlan(tuple(Line(name, *found) for name, found in total.items()), work, forward)


def reduced(point: Reduction, heads: int, rows: int, length: int, wide: int) -> int:
    """Bytes that a reduction keeps of one row of a batch."""
    if isinstance(point, ColumnMass):
        return heads * length * wide
    if isinstance(point, Pooled):
        return heads * (-(-length // point.block)) ** 2 * wide
    if isinstance(point, Top):
        return heads * rows * point.count * (wide + 8)
    return heads * rows * wide if point.by_query else heads * wide


def held(tap: Tap, whole: int, row: int) -> int:
    """Entries of a map that stand there at a time: all of those that are read as they are, else a piece."""
    if not tap.maps:
        return 0
    return 2 * (whole if any(tap.wants(point) for point in MAPS) else min(whole, max(CHUNK, row)))
