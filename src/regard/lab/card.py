"""What `regard show` prints: formula, parts, paper, executors, cost, check."""

from __future__ import annotations

import torch

from ..algebra import Mechanism, Recurrent, Weighted
from ..algebra.mask import Causal, Full
from ..algebra.part import Sizes
from ..catalog import Record, entry, get
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
    """Which executors take the mechanism, for a causal call on this machine."""
    if isinstance(mechanism, Recurrent):
        return "chunk, step, parallel, reference"
    if not isinstance(mechanism, Weighted):
        return "composed, reference"
    sizes = Sizes(1, 8, 8, 1024, 1024, 64, 64)
    mask = Causal() if mechanism.can_be_causal else Full()
    found = make(mechanism, mask, sizes, torch.float32, torch.device("cpu"), False, frozenset(), None)
    others = [name for name in ("sdpa", "tiled", "dense") if name not in dict(found.refused) and name != found.executor]
    names = [f"{found.executor} (chosen: {found.why})", *others]
    if not triton_refusal(mechanism, combine_masks(mechanism, mask), sizes, torch.device("cuda")):
        names.append("triton on a GPU")
    return ", ".join([*names, "reference"])


def place(record: Record) -> str:
    """Where a row lives, or will, below `regard.zoo` and `regard.lab.checks`."""
    return f"{record.family}.{record.slug.replace('-', '_')}"


def path_of(module: str) -> str:
    return module.replace(".", "/") + ".py"


def card(name: str, record: Record | None) -> str:
    """The text of a system's card."""
    lines = [f"{name}: {record.title} ({record.year})" if record else f"{name}: the baseline"]
    if record:
        lines += [f"id {record.id}, family {record.family}, {record.status}" + (f", {record.entry}" if record.entry else "")]
        lines += [f"file {path_of(f'regard.zoo.{place(record)}')}, checks {path_of(f'regard.lab.checks.{place(record)}')}"]
        lines += ["", "parts: " + ", ".join(record.parts)]
    working = record is None or record.status == "works"
    if working:
        found = entry(name)
        lines += ["", found.formula]
        if found.kind == "mechanism":
            mechanism = get(name)
            inputs = [
                f"{item.name} ({' '.join(item.shape) or 'scalar'}{', optional' if item.default is not None else ''})"
                for item in declared(mechanism)
            ]
            lines += [
                "",
                f"hyperparameters: {found.hyperparameters}".replace("'", ""),
                f"inputs: {', '.join(inputs) or 'none'}",
                f"executors: {executors(mechanism)}",
                f"complexity: {COSTS[type(mechanism).__name__]}",
            ]
        else:
            lines += ["", f"used as: {found.where}{found.hyperparameters}".replace("'", "")]
    elif record:
        lines += ["", record.math]
    if record:
        lines += ["", "claim: " + record.claim, "", "check: " + record.check]
        lines += [
            f"  - {one.claim} ({'<=' if one.side == 'below' else '>='} {one.threshold:g}; control: {one.control})"
            for one in checks_of(name)
        ]
    return "\n".join(lines)


def declared(mechanism: Mechanism) -> list:
    from ..engine.composed import inputs_of

    return list(inputs_of(mechanism))
