"""Are sixteen heads really better than one? Heads removed in the order of their importance (id 272; Michel, Levy and Neubig, 2019).

MHA(x) = sum_h xi_h Att_h(x),   I_h = E |dL/dxi_h| = E |Att_h(x) . dL/dAtt_h(x)|;   sort all heads by I, drop the least, a share a round

`regard.interpret` holds the parts: `importance`, `ablated` (masks, reversible) and `prune` (rows and columns really gone).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.interpret.heads import ablated, head_counts, removable
from regard.interpret.tables import Head, HeadTable, table_of
from regard.plots import Plot, figure
from regard.results import Column, Result

Evaluate = Callable[[], float]


@dataclass(frozen=True)
class Round:
    """removed: all heads gone so far; value: what `evaluate` gave then."""

    removed: tuple[Head, ...]
    value: float


@dataclass
class Schedule(Result):
    """rounds: the first is the whole model."""

    heads: int
    rounds: list[Round] = field(default_factory=list)

    def plot(self) -> Plot:
        """The value by the share of heads removed."""
        points = [(100 * len(one.removed) / self.heads, one.value) for one in self.rounds]
        return figure("Heads removed by importance", "heads removed (%)", "value", {"value": points})

    def columns(self) -> dict[str, Column]:
        removed = [len(one.removed) for one in self.rounds]
        return {"heads removed": removed, "share": [n / self.heads for n in removed], "value": [one.value for one in self.rounds]}


def evaluated(model: nn.Module, evaluate: Evaluate, heads: Sequence[Head]) -> float:
    with ExitStack() as stack:
        if heads:
            stack.enter_context(ablated(model, heads))
        with torch.no_grad():
            return float(evaluate())


@register("head-pruning", kind="function")
def prune_schedule(
    model: nn.Module,
    scores: HeadTable | Callable[[], HeadTable],
    evaluate: Evaluate,
    *,
    step: float = 0.1,
    least: int = 1,
    until: float = 1.0,
) -> Schedule:
    """Remove heads, the least important first, `step` of all heads a round, and write down what `evaluate()` gives on the masked model.

    scores: a table made once, as in the paper, or a function that makes it anew before each round, on the model as it is then (`importance`).
    least: heads that stay in every layer. until: the share of heads after which to stop. All attention types share one ranking, and the
    model is as before at the end: `prune(model, schedule.rounds[n].removed)` takes the heads out for good.
    """
    counts = head_counts(model)
    total = sum(counts)
    if not 0 < step <= 1 or not 0 < until <= 1 or least < 0:
        raise RegardError(f"step={step}, until={until}, least={least}; expected shares above 0 and up to 1, and a number of heads")
    found = Schedule(total, [Round((), evaluated(model, evaluate, []))])
    gone: list[Head] = []
    table = scores if isinstance(scores, HeadTable) else None
    for number in range(1, math.ceil(until / step - 1e-9) + 1):
        if table is None or callable(scores):
            assert callable(scores)
            with ExitStack() as stack:
                if gone:
                    stack.enter_context(ablated(model, gone))
                table = scores()
        if tuple(table.scores.shape) != (len(counts), max(counts)):
            raise RegardError(f"scores is a table {tuple(table.scores.shape)}; expected ({len(counts)}, {max(counts)}) as the model")
        order = [*gone, *(at for at in table.ranked(ascending=True) if at not in set(gone))]
        wanted = round(total * min(number * step, until))
        new = removable(order, least, counts)[:wanted]
        if len(new) == len(gone):
            break  # no layer can spare a head
        gone = new
        found.rounds.append(Round(tuple(gone), evaluated(model, evaluate, gone)))
    return found


def ablation_table(model: nn.Module, evaluate: Evaluate, heads: Iterable[Head] | None = None) -> HeadTable:
    """What `evaluate()` gives when one head is removed, for every head (or these; NaN elsewhere)."""
    counts = head_counts(model)
    rows = [torch.full((n,), math.nan, dtype=torch.float64) for n in counts]
    chosen = [(layer, head) for layer, n in enumerate(counts) for head in range(n)] if heads is None else list(heads)
    for layer, head in chosen:
        rows[layer][head] = evaluated(model, evaluate, [(layer, head)])
    return table_of(rows, "without this head")


def best_heads(model: nn.Module, evaluate: Evaluate, layer: int) -> HeadTable:
    """What `evaluate()` gives when only one head of `layer` is left, for each of them: one row, the paper's second table."""
    count = head_counts(model)[layer]
    others = [[(layer, other) for other in range(count) if other != head] for head in range(count)]
    return table_of(
        [torch.tensor([evaluated(model, evaluate, gone) for gone in others], dtype=torch.float64)], f"only this head of layer {layer}"
    )
