"""Reading and editing what a model's attention computes, for as long as a `with` block lasts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType

from torch import nn

from ..adapt.patch import chosen
from ..errors import RegardError
from .points import KEYS, POINTS, STREAM, UNTURNED, Edit, Places, check_points
from .reductions import Reduction
from .seen import Seen
from .site import Site
from .sites import sites
from .station import Station, Tap, station_of

Point = str | Reduction


def read(
    model: nn.Module,
    points: Point | Iterable[Point],
    *,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
    keep: str = "last",
    graph: bool = False,
) -> Taps:
    """`with taps(model, points) as seen: model(...)`, then `seen[point, layer]`.

    points, of every attention layer (B rows, L tokens of the call, Lk keys with those in the cache):
    "q" (B, h, L, D), "k", "v" (B, hkv, Lk, D): as attention takes them, behind rotary positions and norms. "q_pre_rotary" (B, h, L, D),
    "k_pre_rotary" (B, hkv, L, D): what rotary positions turn, behind norms, of the call's own tokens (an edit is turned, and reaches the
    cache); only the channels that the model gives its rotary function; refused where there are none, for q and k are the same there. "logits": what softmax takes,
    (B, h, L, Lk), scaled, with the model's bias and softcap, -inf where nothing is seen. "weights": after softmax, before dropout; rows
    that see nothing are zero. "heads": (B, h, L, Dv), each head's output before the projection. "out": behind the projection, (B, L, dim).
    "residual_in", "residual_mid", "residual_out": the stream before attention, between attention and MLP, and behind the block; "mlp":
    what the MLP gives. And reductions, such as `ColumnMass()`, which never hold a map: `seen[reduction.name, layer]`.

    layers: attention layers in the order of the model's modules (None: all). heads: query heads; of k and v the heads that those read.
    positions: places in the sequence, tokens in the cache counted; negative ones from the end of a call; of k and v, places of keys.
    keep: "last" call, or "all" of them (`seen.all`), as in generation. graph: the outputs of the heads whose maps are read are computed
    from those maps, so that gradients reach them.

    Outputs are bit-equal to the untapped model's (but for `graph`); layers, heads and queries that nobody asked for stay fused. Raises
    RegardError for what the model does not have, before anything runs.
    """
    try:
        found: list[Point] = [points] if isinstance(points, (str, Reduction)) else list(points)
    except TypeError:
        raise RegardError(f"points={points!r}; expected some of {', '.join(POINTS)}, or reductions") from None
    names = check_points(x for x in found if not isinstance(x, Reduction))
    reductions = tuple(x for x in found if isinstance(x, Reduction))
    if len({x.name for x in reductions}) < len(reductions) or {x.name for x in reductions} & set(POINTS):
        raise RegardError(f"points has reductions named {[x.name for x in reductions]}; expected different names, and none of a point")
    if not found:
        raise RegardError(f"points is empty; expected some of {', '.join(POINTS)}, or reductions")
    if keep not in ("last", "all"):
        raise RegardError(f"keep={keep!r}; expected last or all")
    return Taps(model, {}, tuple(names), reductions, layers, heads, positions, graph, Seen(keep == "all"))


def edit(
    model: nn.Module,
    edits: Mapping[str, Edit],
    *,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
) -> Taps:
    """`with taps.edit(model, {point: function}): model(...)`: each function takes the point's tensor, as `read` shows it for these layers,
    heads and positions, and gives one of the same shape to put in its place; with a second argument it is told where (`At`).

    Gradients flow through. Several edits of a point compose in the order of their `with` blocks, and later reads see what they gave.
    Leaving the block restores the model exactly. RegardError for a result of another shape or dtype, or that is not finite.
    """
    if not isinstance(edits, Mapping) or not edits:
        raise RegardError(f"edits={edits!r}; expected a table point -> function, with points among {', '.join(POINTS)}")
    check_points(edits)
    for name, function in edits.items():
        if not callable(function):
            raise RegardError(f"edits[{name!r}] is a {type(function).__name__}; expected a function of a tensor")
    return Taps(model, dict(edits), (), (), layers, heads, positions, False, Seen(False))


class Taps:
    """See `read` and `edit`. The taps are on the model inside the `with` block, and off it behind it."""

    def __init__(
        self,
        model: nn.Module,
        edits: dict[str, Edit],
        reads: tuple[str, ...],
        reductions: tuple[Reduction, ...],
        layers: Iterable[int] | None,
        heads: Iterable[int] | None,
        positions: Iterable[int] | None,
        graph: bool,
        seen: Seen,
    ):
        known = sites(model)
        self.seen = seen
        wanted = None if heads is None else numbers("heads", heads)
        places = Places(None if positions is None else tuple(numbers("positions", positions)))
        self.sites = [known[at] for at in chosen("layers", None if layers is None else numbers("layers", layers), len(known))]
        self.taps: list[Tap] = []
        for site in self.sites:
            own = None if wanted is None else list(dict.fromkeys(chosen("heads", wanted, site.heads)))
            kv = None if own is None else key_heads(site, own, [point for point in edits if point in KEYS])
            self.taps.append(Tap(edits, reads, reductions, own, kv, places, graph, seen))
            for point in (*edits, *reads):
                if point in STREAM and site.stream.missing(point):
                    raise RegardError(
                        f"{type(site.module).__name__} in layer {site.layer} stands in a block in which {point!r} is not known by name; "
                        "expected other points"
                    )
                if point in UNTURNED and site.unturned is not None:
                    raise RegardError(f"{type(site.module).__name__} in layer {site.layer} has no point {point!r}: {site.unturned}")
        self.stations: list[Station] = []

    def __enter__(self) -> Seen:
        if self.stations:
            raise RegardError("these taps are on the model already; expected new ones for a `with` block inside")
        try:
            for site, tap in zip(self.sites, self.taps, strict=True):
                station = station_of(site)
                station.add(tap)
                self.stations.append(station)
        except BaseException:
            self.close()
            raise
        return self.seen

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Take the taps off."""
        for station, tap in zip(self.stations, self.taps, strict=False):
            station.remove(tap)
        self.stations = []


def key_heads(site: Site, heads: Sequence[int], edited: list[str]) -> list[int]:
    """The key heads that query heads read; RegardError where an edit of them would reach other heads."""
    group = site.heads // site.kv_heads
    found = list(dict.fromkeys(head // group for head in heads))
    whole = {head for kv in found for head in range(kv * group, (kv + 1) * group)}
    if edited and whole != set(heads):
        raise RegardError(
            f"heads={list(heads)} share their keys and values with heads {sorted(whole - set(heads))}, which an edit of {edited[0]!r} would "
            f"change too; expected heads={sorted(whole)}"
        )
    return found


def numbers(name: str, given: Iterable[int]) -> list[int]:
    try:
        found = list(given)
    except TypeError:
        raise RegardError(f"{name}={given!r}; expected a list of numbers") from None
    if not found or any(isinstance(x, bool) or not isinstance(x, int) for x in found):
        raise RegardError(f"{name}={found}; expected a list of whole numbers, not empty")
    return found
