"""Secondary attention sinks: tokens that middle layers turn onto the first token's sink direction (id 215; 2025).

Window of the primary sink: from behind the largest rise of |h_l[bos]| over layers to its largest fall after that. In it, token t > bos
is sink-like at layer l iff |cos(h_l[t], h_l[bos])| > 0.9; creation: its first such layer, life: their number.
life >= L - margin: "primary"; least < life < L - margin: "secondary"; else "noise"
Of several `bos` the released code takes the number in the list for the position; here it is the position.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.plots import Plot, heatmap
from regard.results import Column, Result
from regard.taps import edit, read
from regard.taps.points import At


@dataclass(frozen=True)
class Sink:
    """A token that was sink-like at `layers`. kind: "primary", "secondary" or "noise"."""

    position: int
    layers: tuple[int, ...]
    kind: str

    @property
    def creation(self) -> int:
        return self.layers[0]

    @property
    def life(self) -> int:
        return len(self.layers)


def sink_window(norms: Tensor) -> tuple[int, int]:
    """norms (L,) of the first token's state behind each layer -> [start, end) of its sink: rise and fall."""
    steps = norms.diff()
    if not len(steps):
        raise RegardError("hidden_states holds one layer; expected two or more")
    start = int(steps.argmax()) + 1
    rest = steps[start:]
    return start, (int(rest.argmin()) + start + 1 if len(rest) else len(norms))


@register("secondary-attention-sinks", kind="function")
def detect_sinks(
    hidden_states: Sequence[Tensor] | Tensor,
    bos: Sequence[int] = (0,),
    *,
    threshold: float = 0.9,
    margin: int = 15,
    least: int = 4,
    clip: bool = True,
) -> list[list[Sink]]:
    """The states (B, T, D) behind each of L layers, without the embeddings (`seen.stack("residual_out")` of taps, or `hidden_states[1:]`)
    -> for each row its sinks, the primary one first.

    bos: positions that may hold the primary sink; of several the one with the greatest mean norm. margin: a life of L - margin layers or
    more is a primary sink's (15 suits 36 to 64 layers; about 0.3 L elsewhere). least: lives up to it are noise. clip: look only in the
    primary sink's window; without it at all layers.
    """
    states = torch.stack(list(hidden_states)).detach().double()
    if states.dim() != 4:
        raise RegardError(f"hidden_states holds {tuple(states.shape[1:])}; expected (B, T, D) a layer")
    layers, _, length, _ = states.shape
    places = list(bos)
    if not places or any(not 0 <= at < length for at in places):
        raise RegardError(f"bos={places}; expected positions from 0 to {length - 1}")

    def label(life: int) -> str:
        return "primary" if life >= layers - margin else "secondary" if life > least else "noise"

    out = []
    for row in states.unbind(1):
        norms = row[:, places].norm(dim=-1)
        first = places[int(norms.mean(0).argmax())]
        start, end = sink_window(row[:, first].norm(dim=-1)) if clip else (0, layers)
        like = F.cosine_similarity(row[start:end, first + 1 :], row[start:end, first, None], dim=-1).abs() > threshold
        found = [Sink(first, tuple(range(start, end)), label(end - start))]
        for token in like.any(0).nonzero().flatten().tolist():
            at = tuple(start + layer for layer in like[:, token].nonzero().flatten().tolist())
            found.append(Sink(first + 1 + token, at, label(len(at))))
        out.append(found)
    return out


def sink_score(weights: Sequence[Tensor] | Tensor, window: int | None = None) -> Tensor:
    """Maps (B, H, T, T) of L layers -> (B, L, T): the mean weight that token t gets, over heads and over the queries t < i <= t + window
    (None: all behind it). The last token has none behind it and gets 0."""
    maps = torch.stack(list(weights)).mean(2)
    length = maps.shape[-1]
    back = torch.arange(length)[:, None] - torch.arange(length)
    seen = ((back > 0) & (back <= (length if window is None else window))).to(maps)
    return ((maps * seen).sum(-2) / seen.sum(-2).clamp_min(1)).transpose(0, 1)


def sink_levels(sinks: Sequence[Sink], kind: str = "secondary", reach: int = 0) -> list[list[Sink]]:
    """Sinks of a kind grouped by creation layer and life, by creation: two are in one level if each differs by at most `reach`, also by way
    of others."""
    levels: list[list[Sink]] = []
    for sink in (one for one in sinks if one.kind == kind):
        near = [level for level in levels if any(max(abs(sink.creation - o.creation), abs(sink.life - o.life)) <= reach for o in level)]
        levels = [level for level in levels if level not in near] + [[sink, *(one for level in near for one in level)]]
    return sorted(levels, key=lambda level: min((one.creation, one.life) for one in level))


@dataclass(frozen=True)
class Alignment(Result):
    """cosine, norm (B, L, T): of each layer's MLP output with the primary sink's state behind that layer, and its length."""

    cosine: Tensor
    norm: Tensor

    def columns(self) -> dict[str, Column]:
        at = torch.ones_like(self.norm, dtype=torch.bool).nonzero().T.tolist()
        return {
            **dict(zip(("row", "layer", "token"), at, strict=True)),
            "cosine": self.cosine.flatten().tolist(),
            "norm": self.norm.flatten().tolist(),
        }

    def plot(self, row: int = 0) -> Plot:
        """The cosine of one row's tokens, layer by layer."""
        return heatmap("MLP output along the first sink", "token", "layer", self.cosine[row].tolist())


@torch.no_grad()
def mlp_alignment(model: nn.Module, ids: Tensor, bos: int = 0) -> Alignment:
    """Which MLPs turn tokens onto the sink direction: cosine near 1 and a great norm where a secondary sink is made."""
    with read(model, ["mlp", "residual_out"]) as seen:
        model(ids)
    made, states = seen.stack("mlp").double(), seen.stack("residual_out").double()
    found = F.cosine_similarity(made, states[:, :, bos, None], dim=-1)
    return Alignment(found.transpose(0, 1), made.norm(dim=-1).transpose(0, 1))


def suppress(
    model: nn.Module, layer: int, direction: Tensor, threshold: float = 100.0, *, cosine: float = 0.98, skip: int = 3
) -> AbstractContextManager[Any]:
    """A `with` block in which the MLP outputs of `layer` that point along `direction` (D,), cos > `cosine`, get the length `threshold`;
    the first `skip` tokens of a sequence are left alone, cached ones counted."""
    if direction.dim() != 1 or not threshold > 0:
        raise RegardError(f"direction has shape {tuple(direction.shape)}, threshold={threshold}; expected (D,) and a length above 0")

    def shorten(x: Tensor, at: At) -> Tensor:
        if x.shape[-1] != len(direction):
            raise RegardError(f"direction has {len(direction)} channels; expected {x.shape[-1]}")
        along = F.cosine_similarity(x.float(), direction.to(x.device).float(), dim=-1) > cosine
        along &= at.start + torch.arange(x.shape[1], device=x.device) >= skip
        return torch.where(along[..., None], x * (threshold / x.norm(dim=-1, keepdim=True).clamp_min(1e-30)), x)

    return edit(model, {"mlp": shorten}, layers=[layer])
