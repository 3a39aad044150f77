"""Circuit analysis of multiple choice: which heads carry the answer's label, what they attend to, and in how few dimensions (id 146; Lieberum et al., 2023).

direct effect: <o_node / scale, W_U[c] - mean_labels W_U>, the last norm's scale held;  total: metric - metric with the node as on another prompt;
indirect = total - direct.   metric: logit[c] - mean over the labels
low rank: q at the last token and k at the labels, each centred by its own mean, stacked: top `rank` right singular vectors P;
score' = (q0 + P(q - q0)).(k0 + P(k - k0)) / sqrt(d);  the same for values, from the values alone

Not reproduced: a small decoder that answers such questions. Trained from scratch (two layers of width 64, 1500 steps of 64 questions) one is right in 0.29
of the cases (chance: 0.25), and with fewer options and items, a third layer and the labels taught at the items it does no better; the effects and ranks
are therefore checked on planted heads and on a pretrained model that does not know the task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard import taps
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.interpret.heads import check_heads, head_counts
from regard.interpret.tables import Head, HeadResult, HeadTable, table_of
from regard.interpret.weights import head_weights
from regard.taps import Mass

Metric = Callable[[Any], Tensor]


@dataclass(frozen=True)
class TotalEffects(HeadResult):
    """Means over rows: heads, and mlps (layers,)."""

    heads: HeadTable
    mlps: Tensor


@torch.no_grad()
def total_effect(
    model: nn.Module, ids: Tensor, metric: Metric, source: Tensor, *, mean: bool = False, positions: Sequence[int] | None = None
) -> TotalEffects:
    """metric(clean) - metric(with one node's output as on `source` (B, T)), for every head and MLP. metric: the model's output -> (B,).

    source: ids of another prompt for each row (resampling); mean=True: of the mean over its rows. positions: of the node's output (None: all).
    """
    if source.shape[1] != ids.shape[1] or (not mean and len(source) != len(ids)):
        raise RegardError(
            f"ids {tuple(ids.shape)}, source {tuple(source.shape)}; expected prompts of one length{'' if mean else ', a source a row'}"
        )
    counts, at = head_counts(model), None if positions is None else list(positions)
    with taps.read(model, ["heads", "mlp"], positions=at) as seen:
        model(source)
    clean = metric(model(ids))

    def given(point: str, layer: int) -> Tensor:
        x = seen[point, layer]
        return x.mean(0, keepdim=True).expand(len(ids), *x.shape[1:]) if mean else x  # type: ignore[no-any-return]

    def effect(point: str, layer: int, heads: list[int] | None) -> float:
        new = given(point, layer)
        new = new if heads is None else new[:, heads]
        with taps.edit(model, {point: lambda x: new}, layers=[layer], heads=heads, positions=at):
            return float((clean - metric(model(ids))).double().mean())

    heads = [torch.tensor([effect("heads", layer, [head]) for head in range(n)], dtype=torch.float64) for layer, n in enumerate(counts)]
    return TotalEffects(
        table_of(heads, "total effect"), torch.tensor([effect("mlp", layer, None) for layer in range(len(counts))], dtype=torch.float64)
    )


@torch.no_grad()
def head_pattern_report(model: nn.Module, ids: Tensor, roles: Mapping[str, Tensor], position: int = -1) -> dict[str, HeadTable]:
    """The mean weight that each head gives from `position` to the tokens of each role, (B, T) bool by name."""
    for name, role in roles.items():
        if role.shape != ids.shape or role.dtype != torch.bool:
            raise RegardError(f"roles[{name!r}] is {tuple(role.shape)} of {role.dtype}; expected bools of shape {tuple(ids.shape)}")
    with taps.read(model, [Mass(role, name) for name, role in roles.items()], positions=[position]) as seen:
        model(ids)
    return {name: table_of((x[:, :, 0].mean(0) for _, x in seen.items(name)), name) for name in roles}


def letter_kind(weights: Tensor, correct: Tensor, itself: Tensor | None = None, least: float = 0.3, share: float = 0.6) -> str:
    """weights (B, n) of a head on the labels -> "correct" (most of it on the right one), "single" (on one place, right or not), "uniform", or "other" where
    labels get less than `least`; "amplification" where the last token gives more than half to itself, (B,)."""
    if itself is not None and float(itself.mean()) > 0.5:
        return "amplification"
    if float(weights.sum(1).mean()) < least:
        return "other"
    shares = weights / weights.sum(1, keepdim=True).clamp_min(1e-12)
    if float(shares.gather(1, correct[:, None]).mean()) >= share:
        return "correct"
    return "single" if float(shares.mean(0).max()) >= share else "uniform"


def projector(parts: Sequence[Tensor], rank: int) -> Tensor:
    """Sets of vectors (n, D), each already centred, stacked -> the projection (D, D) on their top `rank` right singular vectors."""
    stacked = torch.cat([x.double() for x in parts])
    if not 0 <= rank <= stacked.shape[1]:
        raise RegardError(f"rank={rank}; expected 0 .. {stacked.shape[1]}")
    top = torch.linalg.svd(stacked, full_matrices=False).Vh[:rank]
    return top.T @ top


@dataclass(frozen=True)
class LowRankHead:
    """q0, k0, v0 (D,): means; qk, values (D, D): projections, or None to leave scores or values as they are."""

    at: Head
    position: int
    places: tuple[int, ...]
    q0: Tensor
    k0: Tensor
    v0: Tensor
    qk: Tensor | None
    values: Tensor | None

    @contextmanager
    def patched(self, model: nn.Module) -> Iterator[None]:
        """A `with` block in which the head scores the label places from `position`, and reads their values, in the subspaces alone."""
        (layer, head), places = self.at, list(self.places)
        scale = head_weights(taps.sites(model)[layer]).scale
        kept: dict[str, Tensor] = {}

        def logits(s: Tensor) -> Tensor:
            q = low(seen["q", layer][:, 0, self.position], self.q0, self.qk)
            k = low(seen["k", layer][:, 0, places], self.k0, self.qk)
            out = s.clone()
            out[:, 0, 0, places] = (scale * (k @ q[..., None])[..., 0]).to(s.dtype)
            return out

        def weights(p: Tensor) -> Tensor:
            kept["p"] = p
            return p

        def heads(o: Tensor) -> Tensor:
            v = seen["v", layer][:, 0, places]
            change = low(v, self.v0, self.values) - v
            return o + (kept["p"][:, 0, 0, places].to(change)[..., None] * change).sum(1)[:, None, None].to(o.dtype)

        edits = {
            "weights": weights,
            **({"logits": logits} if self.qk is not None else {}),
            **({"heads": heads} if self.values is not None else {}),
        }
        with (
            taps.read(model, ["q", "k", "v"], layers=[layer], heads=[head]) as seen,  # first: the edits below read it
            taps.edit(model, edits, layers=[layer], heads=[head], positions=[self.position]),
        ):
            yield


def low(x: Tensor, mean: Tensor, projection: Tensor | None) -> Tensor:
    return x if projection is None else mean.to(x) + (x - mean.to(x)) @ projection.to(x)


@register("chinchilla-mcq-circuit-analysis", kind="function")
@torch.no_grad()
def low_rank_head(
    model: nn.Module,
    head: Head,
    ids: Tensor,
    places: Sequence[int],
    rank: int,
    *,
    position: int = -1,
    scores: bool = True,
    values: bool = True,
) -> LowRankHead:
    """The head (layer, head) on prompts ids (B, T), in `rank` dimensions found from its queries at `position` and its keys and values at `places`
    (B or more: the labels'). scores, values: which of the two are compressed. `with found.patched(model): model(ids)` tests it."""
    ((layer, own),) = check_heads(model, [head])
    with taps.read(model, ["q", "k", "v"], layers=[layer], heads=[own]) as seen:
        model(ids)
    q = seen["q", layer][:, 0, position].double()
    k, v = (seen[point, layer][:, 0, list(places)].flatten(0, 1).double() for point in "kv")
    q0, k0, v0 = (x.mean(0) for x in (q, k, v))
    both = projector([q - q0, k - k0], rank) if scores else None
    return LowRankHead((layer, own), position, tuple(places), q0, k0, v0, both, projector([v - v0], rank) if values else None)


def recovered(clean: float, patched: float, ablated: float) -> float:
    """The share of a metric that is left: 1 as in the clean run, 0 as in the ablated one."""
    if clean == ablated:
        raise RegardError("the metric is the same on the clean and the ablated run; expected runs that it tells apart")
    return (patched - ablated) / (clean - ablated)
