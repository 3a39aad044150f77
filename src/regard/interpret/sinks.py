"""What heads give to the first token, on rows where they act and where they rest, and rows that are made to give it all."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RegardError
from ..taps import edit, read
from ..taps.points import At
from .tables import HeadResult, HeadTable, table_of


@dataclass(frozen=True)
class SinkReport(HeadResult):
    """A number a head. dormant, active: mean weight on the first token on dormant and active rows; previous: on the token before, on active
    rows; total: summed weights of dormant rows (1 under softmax); value, key: |v_first|, |k_first| over the mean of the others; gap: the first token's logit
    minus the mean of the others before it, on dormant rows (None where there are no logits). residual (layers,): |h_first| over the mean."""

    dormant: HeadTable
    active: HeadTable
    previous: HeadTable
    total: HeadTable
    value: HeadTable
    gap: HeadTable | None
    residual: Tensor | None
    key: HeadTable | None = None


@torch.no_grad()
def sink_report(model: nn.Module, ids: Tensor, active: Tensor, logits: bool = True, residual: bool = False) -> SinkReport:
    """ids (B, L), first token first; active (B, L) bool: rows on which a head should act. Any tapped decoder."""
    points = ["weights", "k", "v", *(["logits"] if logits else []), *(["residual_out"] if residual else [])]
    with read(model, points) as seen:
        model(ids)
    inner = torch.ones_like(active)
    inner[:, :2] = False  # rows whose first token is themselves or the one before
    rows = {"active": active & inner, "dormant": ~active & inner}
    if not all(bool(x.any()) for x in rows.values()):
        raise RegardError("active marks all rows or none (behind the first two); expected both kinds")

    def mean(x: Tensor, kind: str) -> Tensor:
        """x (B, H, L) over the rows of a kind: (H,)."""
        return x.transpose(1, 2)[rows[kind]].mean(0)

    columns: dict[str, list[Tensor]] = {name: [] for name in ("dormant", "active", "previous", "total", "value", "key", "gap")}
    for layer, w in seen.items("weights"):
        columns["dormant"].append(mean(w[..., 0], "dormant"))
        columns["active"].append(mean(w[..., 0], "active"))
        columns["previous"].append(mean(F.pad(w.diagonal(-1, -2, -1), (1, 0)), "active"))
        columns["total"].append(mean(w.sum(-1), "dormant"))
        for name, point in (("value", "v"), ("key", "k")):
            norms = seen[point, layer].norm(dim=-1).mean(0)
            ratio = norms[:, 0] / norms[:, 1:].mean(1)
            columns[name].append(ratio.repeat_interleave(w.shape[1] // len(ratio)))
        if logits:
            s = seen["logits", layer]
            others = torch.where(torch.ones_like(s, dtype=torch.bool).tril(-1), s, 0.0)[..., 1:].sum(-1)
            columns["gap"].append(mean(s[..., 0] - others / (torch.arange(s.shape[-1]) - 1).clamp_min(1), "dormant"))
    tables = {name: table_of(x, name) for name, x in columns.items() if x}
    streams = torch.stack([h.norm(dim=-1).mean(0) for _, h in seen.items("residual_out")]) if residual else None
    return SinkReport(**{"gap": None, **tables}, residual=None if streams is None else streams[:, 0] / streams[:, 1:].mean(1))  # type: ignore[arg-type]


def forced(model: nn.Module, kind: str, layers: list[int] | None = None, heads: list[int] | None = None) -> AbstractContextManager[Any]:
    """A `with` block in which heads are made to look at the first token ("sink"), the one before ("previous"), themselves ("identity") or
    nothing ("zero"), or the first token's values are zero ("no_value"). Rows that see nothing stay so."""
    if kind == "no_value":
        return edit(model, {"v": torch.zeros_like}, layers=layers, heads=heads, positions=[0])
    if kind not in ("sink", "previous", "identity", "zero"):
        raise RegardError(f"kind={kind!r}; expected sink, previous, identity, zero or no_value")

    def rows(w: Tensor, at: At) -> Tensor:
        place = at.start + torch.arange(w.shape[2], device=w.device)
        key = {"sink": 0 * place, "previous": (place - 1).clamp_min(0), "identity": place, "zero": 0 * place}[kind]
        one = F.one_hot(key, w.shape[-1]).to(w) * (0.0 if kind == "zero" else 1.0)
        return torch.where((w != 0).any(-1, keepdim=True), one, 0.0)

    return edit(model, {"weights": rows}, layers=layers, heads=heads)
