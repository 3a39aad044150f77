"""What stands at one attention layer while it is tapped: every tensor of its calls passes all taps, in the order in which they came."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegardError
from .attending import Attending
from .points import KEYS, MAPS, STREAM, UNTURNED, At, Edit, Places, edited, put, take
from .reductions import Gathered, Reduction, Rows
from .seen import Seen
from .site import Site

CHUNK = 2**20  # entries of a map that reductions look at together

Axes = dict[int, list[int]]


@dataclass(eq=False)
class Tap:
    """What one `with` asks for at one layer. heads, key_heads: None means all. graph: the outputs are made of the maps that are read."""

    edits: dict[str, Edit]
    reads: tuple[str, ...]
    reductions: tuple[Reduction, ...]
    heads: list[int] | None
    key_heads: list[int] | None
    places: Places
    graph: bool
    seen: Seen

    def wants(self, point: str) -> bool:
        return point in self.edits or point in self.reads

    @property
    def maps(self) -> bool:
        return bool(self.reductions) or any(self.wants(point) for point in MAPS)

    @property
    def unfused(self) -> bool:
        """Whether the heads' outputs must be made of maps in the open."""
        return any(point in self.edits for point in MAPS) or (self.graph and self.maps)


@dataclass
class Block:
    """Maps of some heads and queries."""

    heads: list[int]
    rows: list[int]
    logits: Tensor | None
    weights: Tensor


@dataclass(eq=False)
class Station:
    site: Site
    taps: list[Tap] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)

    def add(self, tap: Tap) -> None:
        if not self.taps:
            self.site.watch(self.run)
        self.taps.append(tap)
        try:
            self.rehook()
        except BaseException:
            self.remove(tap)
            raise

    def remove(self, tap: Tap) -> None:
        self.taps.remove(tap)
        self.rehook()
        if not self.taps:
            self.site.leave()
            _stations.pop(self.site.module, None)

    def rehook(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        for point in STREAM:
            if any(tap.wants(point) for tap in self.taps):
                self.hooks += self.site.stream.hook(point, self.through)
        if any(tap.wants(point) for tap in self.taps for point in UNTURNED):
            self.hooks.append(self.site.turning(self.through))

    def axes(self, tap: Tap, point: str, x: Tensor) -> Axes:
        """The part of a point's tensor that a tap takes."""
        start = self.site.clock.start
        if point in STREAM:
            return {1: tap.places.rows(x.shape[1], start)} if tap.places.positions is not None else {}
        chosen = tap.key_heads if point in KEYS else tap.heads
        heads = list(range(x.shape[1])) if chosen is None else chosen
        return {1: heads, 2: tap.places.rows(x.shape[2], 0 if point in ("k", "v") else start)}

    def through(self, point: str, x: Tensor) -> Tensor:
        """A point's whole tensor past all taps."""
        for tap in self.taps:
            if tap.wants(point):
                axes = self.axes(tap, point, x)
                if all(axes.values()):
                    x = self.past(tap, point, x, axes)
        return x

    def past(self, tap: Tap, point: str, x: Tensor, axes: Axes) -> Tensor:
        own = take(x, axes)
        if point in tap.edits:
            new = edited(tap.edits[point], own, self.at(tap, point))
            x, own = (x if new is own else put(x, axes, new)), new
        if point in tap.reads:
            tap.seen.add(point, self.site.layer, own)
        return x

    def at(self, tap: Tap, point: str) -> At:
        heads, clock = tap.key_heads if point in KEYS else tap.heads, self.site.clock
        chosen = None if heads is None or point in STREAM else tuple(heads)
        return At(self.site.layer, point, chosen, tap.places.positions, clock.start, clock.real)

    def run(self, call: Attending) -> tuple[Tensor, Any]:
        """Heads (B, H, Lq, Dv) of a call, and its weights where the host asked for them."""
        blind = [point for point in STREAM if call.stepped and point != "mlp" and any(tap.wants(point) for tap in self.taps)]
        if blind:
            raise RegardError(
                f"points {', '.join(blind)} are not seen in a step of regard's own layers; expected a forward pass over all tokens"
            )
        call = call.with_heads(*(self.through(point, x) for point, x in zip("qkv", (call.query, call.key, call.value), strict=True)))
        out, p = call.fused(call.query, call.key, call.value)
        wanting = [tap for tap in self.taps if tap.maps]
        if any(tap.unfused for tap in wanting):
            out, p = self.opened(call, wanting, out, p)
        else:
            for tap in wanting:
                self.look(call, tap)
        return self.through("heads", out), p

    def look(self, call: Attending, tap: Tap) -> None:
        """Maps and reductions that a tap reads beside the fused path."""
        axes = self.axes(tap, "weights", call.query)
        heads, rows = axes[1], axes[2]
        if not rows:
            return
        device = call.query.device
        of, at = torch.tensor(heads, device=device), torch.tensor(rows, device=device)
        if tap.reads and any(point in MAPS for point in tap.reads):
            logits = call.logits(of, at) if "logits" in tap.reads else None
            if logits is not None:
                tap.seen.add("logits", self.site.layer, logits)
            weights = call.weights(of, at, logits) if "weights" in tap.reads or tap.reductions else None
            if weights is not None and "weights" in tap.reads:
                tap.seen.add("weights", self.site.layer, weights)
            if weights is not None:
                self.reduce(call, tap, [(at, weights)])
        elif tap.reductions:
            size = max(1, CHUNK // max(1, call.query.shape[0] * len(heads) * call.k_len))
            look = call.seen if all(one.short for one in tap.reductions) else call.weights
            self.reduce(call, tap, ((part, look(of, part)) for part in at.split(size)))

    def reduce(self, call: Attending, tap: Tap, parts: Any) -> None:
        gathered = [Gathered(reduction, []) for reduction in tap.reductions]
        clock = self.site.clock
        for at, weights in parts:
            real = None
            if clock.real is not None and clock.real.shape[0] == weights.shape[0] and clock.real.shape[1] >= clock.start + call.q_len:
                real = clock.real[:, clock.start + at].to(weights.device)[:, None]
            for one in gathered:
                one.add(Rows(weights, at, clock.start + at, real, call.q_len, call.k_len))
        for one in gathered:
            tap.seen.add(one.reduction.name, self.site.layer, one.all())

    def opened(self, call: Attending, wanting: list[Tap], out: Tensor, p: Any) -> tuple[Tensor, Any]:
        """The call with maps in the open: all taps' heads and queries together, of which the edited ones make the outputs."""
        takes = [self.axes(tap, "weights", call.query) for tap in wanting]
        heads, rows = (sorted({at for axes in takes for at in axes[axis]}) for axis in (1, 2))
        if not rows:
            return out, p
        device = call.query.device
        of, at = torch.tensor(heads, device=device), torch.tensor(rows, device=device)
        logits: Tensor | None = None
        if any(tap.wants("logits") for tap in wanting):
            logits = self.block(wanting, takes, "logits", heads, rows, call.logits(of, at))
        weights = self.block(wanting, takes, "weights", heads, rows, call.weights(of, at, logits))
        for tap, axes in zip(wanting, takes, strict=True):
            if tap.reductions and axes[2]:
                own = take(weights, inside(axes, heads, rows))
                self.reduce(call, tap, [(torch.tensor(axes[2], device=device), own)])
        changed = [axes for tap, axes in zip(wanting, takes, strict=True) if tap.unfused]
        mine: Axes = {axis: sorted({at for axes in changed for at in axes[axis]}) for axis in (1, 2)}
        own = take(weights, inside(mine, heads, rows))
        new = call.outputs(own, torch.tensor(mine[1], device=device)).to(out.dtype)
        return put(out, mine, new), put(p, mine, own.to(p.dtype)) if isinstance(p, Tensor) else p

    def block(self, wanting: list[Tap], takes: list[Axes], point: str, heads: list[int], rows: list[int], x: Tensor) -> Tensor:
        for tap, axes in zip(wanting, takes, strict=True):
            if tap.wants(point) and axes[2]:
                x = self.past(tap, point, x, inside(axes, heads, rows))
        return x


def inside(axes: Axes, heads: list[int], rows: list[int]) -> Axes:
    """A part of the call as a part of the maps of these heads and queries."""
    head, row = ({at: number for number, at in enumerate(known)} for known in (heads, rows))
    return {1: [head[at] for at in axes[1]], 2: [row[at] for at in axes[2]]}


_stations: weakref.WeakKeyDictionary[nn.Module, Station] = weakref.WeakKeyDictionary()


def station_of(site: Site) -> Station:
    """The station of a site's module: the one at work, if there is one."""
    return _stations.setdefault(site.module, Station(site))
