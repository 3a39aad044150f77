"""Which kind of efficient attention is each: the survey's classes, read off the descriptions themselves (id 84; Sun et al., 2025).

linear: kernel | decay | fast weight | in-context;  sparse: fixed | block routing | clustering | learned;  hybrid: in a layer | between layers
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regard.algebra import Clustered, Hybrid, LocalLinear, LogLinear, Mechanism, Nystrom, Program, Recurrent, Relayed, Slots, Weighted
from regard.algebra.mask import Full, Mask
from regard.catalog import get, names
from regard.catalog.registry import register
from regard.engine.stream import reach

LEAVES = (
    "linear, kernel",
    "linear, decay",
    "linear, fast weight",
    "linear, in-context regression",
    "sparse, fixed",
    "sparse, block routing",
    "sparse, clustering",
    "sparse, learned",
    "hybrid, in a layer",
    "hybrid, between layers",
    "reduced, low rank",
    "dense",
)

# Layers and models have no description to be read; each is a row's entry of its own.
MODULES = {
    "lalte": "sparse, learned",
    "sea": "sparse, learned",
    "transformer-vq": "sparse, clustering",
    "longvq": "sparse, clustering",
    "afa": "linear, in-context regression",
    "minimax-01": "hybrid, between layers",
    "minimax-m1": "hybrid, between layers",
    "rnope": "hybrid, between layers",
    "combiner": "reduced, low rank",
    "kernelized-attention-rpe": "linear, kernel",
    "vig": "linear, decay",
    "mega": "hybrid, in a layer",
    "dma": "sparse, learned",
    "nats": "sparse, learned",
    "mosa": "sparse, learned",
    "sparsifiner": "sparse, learned",
    "seerattention": "sparse, learned",
    "sla": "hybrid, in a layer",
    "biformer": "sparse, block routing",
    "landmark-attention": "sparse, block routing",
    "superlinear-attention": "sparse, block routing",
    "flashmoba": "sparse, block routing",
    "ssa": "sparse, block routing",
    "hylra": "sparse, block routing",
    "longheads": "sparse, block routing",
    "ltri-llm": "sparse, block routing",
    "dbsa": "sparse, block routing",
    "halonet": "sparse, fixed",
    "fused-neighborhood": "sparse, fixed",
    "flash-window-attention": "sparse, fixed",
    "alternating-sparse-attention": "hybrid, between layers",
    "flux-attention": "hybrid, between layers",
    "minicpm-sala": "hybrid, between layers",
}


@dataclass(frozen=True)
class Place:
    """Where a system stands. train: time over length L; state: how its bytes grow when decoding, "none" (constant), "log" or "linear", or "-" where it
    does not decode; forms: the executions that agree."""

    name: str
    leaf: str
    train: str
    state: str
    causal: bool
    bidirectional: bool
    forms: str


def leaf_of(mechanism: Mechanism) -> str:
    """The survey's class of a description."""
    if isinstance(mechanism, LogLinear):
        mechanism = mechanism.inner
    if isinstance(mechanism, Recurrent):
        if mechanism.write == "delta":
            return "linear, fast weight"
        return "linear, decay" if mechanism.decay != "none" or mechanism.keys == "softmax" else "linear, kernel"
    if isinstance(mechanism, Slots):
        return "linear, decay" if mechanism.window is None else "hybrid, in a layer"
    if isinstance(mechanism, LocalLinear):
        return "linear, in-context regression"
    if isinstance(mechanism, Clustered):
        return "sparse, clustering"
    if isinstance(mechanism, Program):
        return "sparse, clustering" if mechanism == get("hyperattention") else "sparse, block routing"
    if isinstance(mechanism, Hybrid):
        return "hybrid, in a layer"
    if isinstance(mechanism, (Relayed, Nystrom)):
        return "reduced, low rank"
    assert isinstance(mechanism, Weighted)
    if mechanism.select is not None:
        return "sparse, block routing"
    return "dense" if isinstance(mechanism.mask, Full) else "sparse, fixed"


def growth_of(mechanism: Mechanism) -> str:
    """How the state of a stream grows."""
    if isinstance(mechanism, Hybrid):
        found = {growth_of(member) for member in mechanism.members}
        return next(kind for kind in ("-", "linear", "log", "none") if kind in found)
    if not (mechanism.can_be_causal or mechanism.causal_only) or isinstance(mechanism, (Clustered, Relayed, Nystrom)):
        return "-"
    if isinstance(mechanism, Program):
        return "linear"
    if isinstance(mechanism, Weighted):
        mask = mechanism.mask
        assert isinstance(mask, Mask)
        return "linear" if reach(mechanism, mask) is None else "none"
    return "linear" if isinstance(mechanism, LocalLinear) else "log" if isinstance(mechanism, LogLinear) else "none"


def train_of(mechanism: Mechanism) -> str:
    if isinstance(mechanism, LogLinear):
        return "L log L"
    if isinstance(mechanism, (Recurrent, Slots, Relayed, Nystrom)):
        return "L"
    if isinstance(mechanism, Hybrid):
        return "L^2" if any(train_of(member) == "L^2" for member in mechanism.members) else "L"
    if isinstance(mechanism, Clustered):
        return "L^1.5"
    if isinstance(mechanism, Program) or (
        isinstance(mechanism, Weighted) and (mechanism.select is not None or not isinstance(mechanism.mask, Full))
    ):
        return "density x L^2"
    return "L^2"


def forms_of(mechanism: Mechanism) -> str:
    if isinstance(mechanism, (Recurrent, LogLinear)):
        return "parallel, chunk, step"
    if isinstance(mechanism, Slots):
        return "chunk, step"
    return "whole, step" if growth_of(mechanism) != "-" else "whole"


def place_of(name: str, mechanism: Mechanism) -> Place:
    causal = mechanism.can_be_causal or mechanism.causal_only
    return Place(
        name, leaf_of(mechanism), train_of(mechanism), growth_of(mechanism), causal, not mechanism.causal_only, forms_of(mechanism)
    )


@register("efficient-attention-survey", kind="module")
def taxonomy() -> dict[str, list[Place | str]]:
    """For each class of the survey the systems that work here: `Place`s of mechanisms, names of layers and models."""
    found: dict[str, list[Any]] = {leaf: [] for leaf in LEAVES}
    for name in names():
        place = place_of(name, get(name))
        found[place.leaf].append(place)
    known = set(names(None))
    for name, leaf in MODULES.items():
        if name in known:
            found[leaf].append(name)
    return found


def table() -> str:
    """The taxonomy as Markdown."""
    lines = ["| class | system | training time | state when decoding | both directions | forms |", "|---|---|---|---|---|---|"]
    for leaf, members in taxonomy().items():
        for one in members:
            if isinstance(one, str):
                lines.append(f"| {leaf} | {one} (layer) | | | | |")
            else:
                grows = {"none": "constant", "log": "log L", "linear": "L", "-": "-"}[one.state]
                lines.append(f"| {leaf} | {one.name} | {one.train} | {grows} | {'yes' if one.bidirectional else 'no'} | {one.forms} |")
    return "\n".join(lines) + "\n"
