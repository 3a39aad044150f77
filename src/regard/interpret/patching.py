"""Activations of one run put into another: whole heads, or only the path from some heads to others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import taps
from ..errors import RegardError
from ..taps.points import At
from ..taps.seen import Seen
from .heads import check_heads, head_counts
from .tables import Head, HeadTable

Metric = Callable[[Any], Tensor]
COMPONENTS = {"z": "heads", "q": "q", "k": "k", "v": "v"}


def logit_difference(answers: Tensor, position: int = -1) -> Metric:
    """answers (B, 2): the mean over rows of logit[first] - logit[second] at a position."""

    def metric(out: Any) -> Tensor:
        logits = getattr(out, "logits", out)[:, position]
        found = logits.gather(1, answers.to(logits.device))
        return (found[:, 0] - found[:, 1]).mean()

    return metric


@dataclass(frozen=True)
class Runs:
    """Both runs' heads and MLP outputs, and their metrics."""

    clean: Seen
    corrupt: Seen
    value: float
    other: float


def both(model: nn.Module, clean: Tensor, corrupt: Tensor, metric: Metric, mlps: bool) -> Runs:
    if clean.shape != corrupt.shape:
        raise RegardError(f"clean {tuple(clean.shape)}, corrupt {tuple(corrupt.shape)}: expected inputs of one shape, token for token")
    points, found = ["heads", *(["mlp"] if mlps else [])], []
    for ids in (clean, corrupt):
        with taps.read(model, points) as seen:
            found.append((seen, float(metric(model(ids)))))
    (one, value), (two, other) = found
    return Runs(one, two, value, other)


def held(runs: Runs, senders: Sequence[Head], positions: list[int]) -> Callable[[Tensor, At], Tensor]:
    """An edit of "heads" that gives the clean run's, but for the senders, which give the corrupt run's."""

    def edit(x: Tensor, at: At) -> Tensor:
        out = runs.clean["heads", at.layer][:, :, positions].clone()
        for layer, head in senders:
            if layer == at.layer:
                out[:, head] = runs.corrupt["heads", layer][:, head, positions]
        return out

    return edit


@torch.no_grad()
def path_patch(
    model: nn.Module,
    clean: Tensor,
    corrupt: Tensor,
    metric: Metric,
    *,
    receivers: Iterable[Head] | None = None,
    component: str = "q",
    senders: Iterable[Head | Sequence[Head]] | None = None,
    position: int | Sequence[int] = -1,
    freeze_mlp: bool = False,
) -> HeadTable:
    """The effect of each sender head on `metric` through the receivers alone: (patched - clean) / (corrupt - clean), (layers, heads).

    First the clean input runs with the sender's output of the corrupt one at `position`, and all other heads' (with freeze_mlp the MLPs'
    too) as in the clean run; what then comes to the receivers is kept: `component` "q", "k", "v" or "z" of these heads, or, with
    receivers=None, the stream behind the last layer. Then the clean input runs with that put in. senders: heads, or groups of heads that
    go together (None: every head alone); heads that are receivers, or stand above the lowest receiver's layer, are left out (NaN).
    Wang et al., 2022; Merullo et al., 2023. 2 passes a sender.
    """
    if component not in COMPONENTS:
        raise RegardError(f"component={component!r}; expected one of {', '.join(COMPONENTS)}")
    positions = [position] if isinstance(position, int) else list(position)
    aims = None if receivers is None else check_heads(model, receivers)
    counts = head_counts(model)
    top = len(counts) - 1 if aims is None else min(layer for layer, _ in aims)
    groups: list[list[Head]] = []
    for one in [(layer, head) for layer, n in enumerate(counts) for head in range(n)] if senders is None else senders:
        groups.append(check_heads(model, [one] if isinstance(one[0], int) else one))  # type: ignore[list-item, arg-type]
    runs = both(model, clean, corrupt, metric, freeze_mlp)
    if runs.value == runs.other:
        raise RegardError("the metric is the same on clean and corrupt; expected inputs that it tells apart")
    scores = torch.full((len(counts), max(counts)), float("nan"), dtype=torch.float64)
    for group in groups:
        if any(layer > top for layer, _ in group) or (aims is not None and set(group) & set(aims)):
            continue
        value = patched(model, clean, metric, runs, group, aims, COMPONENTS[component], positions, freeze_mlp)
        effect = (value - runs.value) / (runs.other - runs.value)
        for at in group:
            scores[at] = effect
    return HeadTable(scores, "effect")


def patched(
    model: nn.Module,
    clean: Tensor,
    metric: Metric,
    runs: Runs,
    group: Sequence[Head],
    aims: Sequence[Head] | None,
    point: str,
    positions: list[int],
    freeze_mlp: bool,
) -> float:
    """The metric of the clean input with only the paths from a group of heads to the aims taken from the corrupt one."""
    last = len(head_counts(model)) - 1
    by_layer = {last: []} if aims is None else {layer: [head for at, head in aims if at == layer] for layer, _ in aims}
    point = "residual_out" if aims is None else point
    with ExitStack() as stack:
        # Readers first: they see what comes to the receivers before it is held to the clean run's.
        seen = {
            layer: stack.enter_context(taps.read(model, point, layers=[layer], heads=heads or None, positions=positions))
            for layer, heads in by_layer.items()
        }
        stack.enter_context(taps.edit(model, {"heads": held(runs, group, positions)}, positions=positions))
        if freeze_mlp:
            stack.enter_context(taps.edit(model, {"mlp": lambda x, at: runs.clean["mlp", at.layer][:, positions]}, positions=positions))
        model(clean)
    with ExitStack() as stack:
        for layer, heads in by_layer.items():
            kept = seen[layer][point, layer]
            stack.enter_context(
                taps.edit(model, {point: lambda x, kept=kept: kept}, layers=[layer], heads=heads or None, positions=positions)
            )
        return float(metric(model(clean)))


@torch.no_grad()
def activation_patch(
    model: nn.Module, clean: Tensor, corrupt: Tensor, metric: Metric, *, heads: Iterable[Head] | None = None, position: int | None = None
) -> HeadTable:
    """The effect of each head's whole output, nothing held: the clean input with the corrupt run's head at `position` (None: everywhere)."""
    counts = head_counts(model)
    runs = both(model, clean, corrupt, metric, False)
    if runs.value == runs.other:
        raise RegardError("the metric is the same on clean and corrupt; expected inputs that it tells apart")
    scores = torch.full((len(counts), max(counts)), float("nan"), dtype=torch.float64)
    chosen = [(layer, head) for layer, n in enumerate(counts) for head in range(n)] if heads is None else check_heads(model, heads)
    for layer, head in chosen:
        put = runs.corrupt["heads", layer][:, [head]]
        put = put if position is None else put[:, :, [position]]
        with taps.edit(
            model, {"heads": lambda x, put=put: put}, layers=[layer], heads=[head], positions=None if position is None else [position]
        ):
            scores[layer, head] = (float(metric(model(clean))) - runs.value) / (runs.other - runs.value)
    return HeadTable(scores, "effect")
