"""What a system's own code says of it: hyperparameters, inputs, executors, cost, checks."""

from __future__ import annotations

import re

import torch

from ..algebra import Mechanism, Recurrent, Weighted
from ..algebra.mask import Full
from ..algebra.part import Sizes
from ..algebra.position_mask import Causal
from ..catalog import entry, get
from ..catalog.registry import Entry
from ..engine.composed import inputs_of
from ..engine.plan import make, triton_refusal
from ..engine.problem import combine_masks
from .verification import checks_of

COSTS = {
    "Weighted": "time O(Lq Lk D), memory O(L tile); decode O(L) a token, cache O(L)",
    "Recurrent": "time O(L F Dv), decode O(F Dv) a token, state F x Dv",
    "Relayed": "time O(L m D), m agents",
    "Nystrom": "time O(L m D + m^3), m landmarks",
    "Clustered": "time O(L^1.5 D) at sqrt(L) clusters",
    "Hybrid": "the sum of its members",
    "Slots": "time O(L (m + w) D), m slots and a window w; decode O((m + w) D) a token, state (m + w) (D + Dv)",
    "LogLinear": "time O(L log L F Dv), decode O(log L F Dv) a token, up to log2(L) + 2 states of F x Dv",
    "Program": "the sum of the calls it is made of",
    "LocalLinear": "time O(Lq Lk D iterations), memory O(block Lk); decode O(L D iterations) a token, cache O(L)",
}


def executors(mechanism: Mechanism) -> str:
    """Which executors take the mechanism, for a causal call on a CPU."""
    if isinstance(mechanism, Recurrent):
        return "chunk, step, parallel, reference"
    if not isinstance(mechanism, Weighted):
        return "composed, reference"
    sizes = Sizes(1, 8, 8, 1024, 1024, 64, 64)
    mask = Causal() if mechanism.can_be_causal else Full()
    found = make(mechanism, mask, sizes, torch.float32, torch.device("cpu"), False, frozenset(), None)
    others = [name for name in ("sdpa", "tiled", "dense") if name not in dict(found.refused) and name != found.executor]
    names = [f"{found.executor} (chosen)", *others]
    if not triton_refusal(mechanism, combine_masks(mechanism, mask), sizes, torch.device("cuda")):
        names.append("triton on a GPU")
    return ", ".join([*names, "reference"])


def signature(found: Entry) -> str:
    """How a row is made; functions by their names alone."""
    return re.sub(r"<function ([\w.]+) at 0x\w+>", r"\1", str(found.hyperparameters)).replace("'", "")


def lines(name: str) -> list[str]:
    """What a working system's own code says of it: the lines that `regard show` reads from catalog/cards.json."""
    found = entry(name)
    if found.kind == "mechanism":
        mechanism = get(name)
        inputs = [
            f"{item.name} ({' '.join(item.shape) or 'scalar'}{', optional' if item.default is not None else ''})"
            for item in inputs_of(mechanism)
        ]
        out = [
            f"hyperparameters: {signature(found)}",
            f"inputs: {', '.join(inputs) or 'none'}",
            f"executors: {executors(mechanism)}",
            f"complexity: {COSTS[type(mechanism).__name__]}",
        ]
    else:
        out = [f"used as: {found.where}{signature(found)}"]
    checks = checks_of(name)
    out += ["", "checked:"] if checks else []
    return out + [f"  - {one.claim} ({'<=' if one.side == 'below' else '>='} {one.threshold:g}; control: {one.control})" for one in checks]
