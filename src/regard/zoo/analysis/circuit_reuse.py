"""Circuit component reuse: the heads of one task's circuit are found again in another's (id 132; Merullo, Eickhoff and Pavlick, 2023).

Path patching finds what reaches the logits, then what reaches those heads' queries, keys and values; overlap |C1 & C2| / |C1 | C2|;
repair: at the last token some heads are made to look at the tokens to be suppressed. `regard.interpret.path_patch` is the instrument.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.interpret.heads import check_heads
from regard.interpret.patching import Metric, path_patch
from regard.interpret.tables import Head, HeadTable, table_of
from regard.interpret.weights import written
from regard.plots import Plot
from regard.results import Column, Result
from regard.taps import Seen, edit, sites


@dataclass
class Circuit(Result):
    """roles: "logits" for the heads that reach the logits, then "q of logits" and so on for those that reach their queries. effects: the
    tables they were chosen from."""

    roles: dict[str, list[Head]] = field(default_factory=dict)
    effects: dict[str, HeadTable] = field(default_factory=dict)

    @property
    def heads(self) -> set[Head]:
        return {head for found in self.roles.values() for head in found}

    def columns(self) -> dict[str, Column]:
        rows = [(role, *at, float(self.effects[role].scores[at])) for role, heads in self.roles.items() for at in heads]
        return {name: [row[at] for row in rows] for at, name in enumerate(("role", "layer", "head", "effect"))}

    def plot(self, role: str = "logits") -> Plot:
        """The effects that the heads of a role were chosen from."""
        if role not in self.effects:
            raise RegardError(f"role={role!r}; expected one of {', '.join(self.effects) or 'none: the circuit is empty'}")
        return self.effects[role].plot()


def strong(table: HeadTable, threshold: float) -> list[Head]:
    return sorted((at for at in table.heads if abs(float(table.scores[at])) >= threshold), key=lambda at: -abs(float(table.scores[at])))


@register("circuit-reuse", kind="function")
def find_circuit(
    model: nn.Module,
    clean: Tensor,
    corrupt: Tensor,
    metric: Metric,
    *,
    threshold: float = 0.05,
    components: Sequence[str] = ("q", "k", "v"),
    depth: int = 2,
    position: int = -1,
    freeze_mlp: bool = False,
) -> Circuit:
    """A circuit from the logits backwards: heads whose |effect| on the final stream is at least `threshold`, then, `depth` - 1 times, those
    whose effect through the queries, keys or values of the level before is. Key heads that several query heads share are patched whole."""
    if depth < 1 or threshold <= 0:
        raise RegardError(f"depth={depth}, threshold={threshold}; expected 1 or more, and above 0")
    options = {"position": position, "freeze_mlp": freeze_mlp}
    found = Circuit()
    table = path_patch(model, clean, corrupt, metric, **options)  # type: ignore[arg-type]
    found.roles["logits"], found.effects["logits"] = strong(table, threshold), table
    level = ["logits"]
    groups = {site.layer: site.heads // site.kv_heads for site in sites(model)}
    for _ in range(depth - 1):
        below = []
        for role in level:
            aims = [at for at in found.roles[role] if at[0] > 0]
            for component in components if aims else ():
                whole = aims if component == "q" else sorted({(n, h) for n, head in aims for h in shared(head, groups[n])})
                name = f"{component} of {role}"
                table = path_patch(model, clean, corrupt, metric, receivers=whole, component=component, **options)  # type: ignore[arg-type]
                found.roles[name], found.effects[name] = strong(table, threshold), table
                below.append(name)
        level = below
    return found


def shared(head: int, group: int) -> range:
    """The query heads that read the same keys as `head`."""
    return range(head // group * group, head // group * group + group)


@dataclass(frozen=True)
class Overlap(Result):
    """union: |both| / |either|; first, second: the share of each circuit's heads that the other has."""

    union: float
    first: float
    second: float


def circuit_overlap(one: Iterable[Head], two: Iterable[Head]) -> Overlap:
    a, b = set(one), set(two)
    if not a or not b:
        raise RegardError("a circuit has no heads; expected some in both")
    both = len(a & b)
    return Overlap(both / len(a | b), both / len(a), both / len(b))


def repair(model: nn.Module, rows: Mapping[Head, Tensor], position: int = -1) -> AbstractContextManager[ExitStack]:
    """A `with` block in which heads look, at `position`, only at the tokens given: rows[layer, head] (B, n) numbers of keys, which share the
    row evenly."""
    check_heads(model, rows)
    stack = ExitStack()
    for (layer, head), keys in rows.items():

        def look(w: Tensor, keys: Tensor = keys) -> Tensor:
            at = keys.to(w.device)
            if at.dim() != 2 or at.shape[0] != w.shape[0] or bool(((at < 0) | (at >= w.shape[-1])).any()):
                raise RegardError(
                    f"rows holds {tuple(at.shape)} for {w.shape[0]} rows of {w.shape[-1]} keys; expected (B, n) numbers of keys"
                )
            part = torch.zeros_like(w[:, 0, 0]).scatter_add_(1, at, torch.full_like(at, 1.0 / at.shape[1], dtype=w.dtype))
            return part[:, None, None].expand_as(w)

        stack.enter_context(edit(model, {"weights": look}, layers=[layer], heads=[head], positions=[position]))
    return stack


def direct_attribution(model: nn.Module, seen: Seen, direction: Tensor, scale: Tensor | float = 1.0, position: int = -1) -> HeadTable:
    """<z_h W_O^h / scale, direction>: what each head adds to a logit difference by itself, averaged over rows.

    seen: of the point "heads" in all layers. direction (dim,) or (B, dim): W_U[right] - W_U[wrong], with the last norm's factors in it.
    scale: by what the last norm divides each row's stream, (B,) or a number."""
    rows = []
    for site in sites(model):
        out = written(site, seen["heads", site.layer])[:, :, position]
        along = (out * (direction if direction.dim() == 2 else direction[None])[:, None].to(out)).sum(-1)
        rows.append((along / (scale[:, None] if isinstance(scale, Tensor) else scale)).mean(0))
    return table_of(rows, "direct effect")
