"""The attentive survey's four axes (Chaudhari et al., 2019), read off descriptions, signatures and the catalogue's parts.

sequences: what queries and keys come from. "self": one sequence; "distinctive": two, which every mechanism takes that is not causal alone, and every
layer whose forward has a second sequence; "co": both attend to one another. abstraction: "multi" where attention is over levels of pooled tokens.
positions: "soft", all that the mask shows; "hard", those that are chosen for a query; "local", those near it. representations: "multi-dimensional"
where weights are a channel's own; "multi" where several embeddings of one input are weighed. A row may have several values of an axis. What a
factory says in an attribute `axes` outranks all this. Experiments, functions and strategies have no sequences.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from ..errors import MissingDependency, RegardError, nearest
from .registry import Entry, describe, entries
from .shipped import rows

AXES: Mapping[str, tuple[str, ...]] = {
    "sequences": ("distinctive", "co", "self"),
    "abstraction": ("single", "multi"),
    "positions": ("soft", "hard", "local"),
    "representations": ("single", "multi", "multi-dimensional"),
}
NEAR = frozenset({"window", "dilation"})  # parts of the catalogue
CHOSEN = frozenset({"topk", "top-p", "routing", "dynamic-mask", "clustering/lsh"})
NEAR_MASKS = frozenset({"Window", "Neighborhood", "Dilated", "FixedBlock"})
SECOND = frozenset({"context", "keys", "key", "k", "memory", "source", "other", "text"})

Axes = Mapping[str, frozenset[str]]


@functools.cache
def parts_of_rows() -> dict[str, frozenset[str]]:
    return {row["slug"]: frozenset(row["parts"]) for row in rows()}


def axes_of(one: Entry) -> Axes:
    """The values of each axis that a registered system has; of a layer whose optional package is missing, without its sequences."""
    parts = parts_of_rows().get(one.name, frozenset())
    try:
        factory: Any = one.factory
    except MissingDependency:
        factory = None
    said = getattr(factory, "axes", None)
    if said is not None:
        return said  # type: ignore[no-any-return]
    near, chosen, sequences = bool(parts & NEAR), bool(parts & CHOSEN), frozenset[str]()
    if one.kind == "mechanism":
        mechanism = describe(one.name)
        inside = {type(part).__name__ for part in mechanism.parts()}
        near = near or bool(inside & NEAR_MASKS)
        chosen = chosen or getattr(mechanism, "select", None) is not None
        sequences = frozenset({"self"} if mechanism.causal_only else {"self", "distinctive"})
    elif one.kind in ("module", "model") and inspect.isclass(factory) and hasattr(factory, "forward"):
        asked = set(inspect.signature(factory.forward).parameters)
        sequences = frozenset({"self", "distinctive"} if asked & SECOND else {"self"})
    elif one.kind == "policy":
        sequences = frozenset({"self"})
    places = {name for name, is_it in (("local", near), ("hard", chosen)) if is_it} or {"soft"}
    return {
        "sequences": sequences,
        "abstraction": frozenset({"multi" if "hierarchical" in parts else "single"}),
        "positions": frozenset(places),
        "representations": frozenset({"multi-dimensional" if "channel-attention" in parts else "single"}),
    }


def with_axes(kind: str | None, asked: Mapping[str, str]) -> list[str]:
    """Names of one kind (None: all) that have every value asked for; RegardError for axes and values that are not known."""
    for axis, value in asked.items():
        if axis not in AXES:
            raise RegardError(f"axis {axis!r}={value!r}; expected some of {', '.join(AXES)}.{nearest(axis, AXES)}")
        if value not in AXES[axis]:
            raise RegardError(f"{axis}={value!r}; expected one of {', '.join(AXES[axis])}.{nearest(str(value), AXES[axis])}")
    fitting = [(name, one) for name, one in sorted(entries().items()) if kind in (None, one.kind)]
    return [name for name, one in fitting if all(value in axes_of(one)[axis] for axis, value in asked.items())]
