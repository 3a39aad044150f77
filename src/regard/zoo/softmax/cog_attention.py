"""Cog attention: negative weights (id 15; Lv et al., 2024).

p_ij = sign(s_ij) exp|s_ij| / sum_j exp|s_ij|        sum_j |p_ij| = 1 (a score of exactly 0 weighs 0 but counts in the sum)

Not built: image diffusion blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.algebra import RowLocal, Weighted
from regard.catalog.registry import register
from regard.interpret import head_weights
from regard.interpret.tables import HeadResult, HeadTable, table_of
from regard.taps import read, sites
from regard.tasks.statistics import token_distance


def signed(s: Tensor, c: Tensor) -> Tensor:
    return torch.sign(s) * torch.exp(torch.abs(s) - c)


def strength(s: Tensor, c: Tensor) -> Tensor:
    return torch.exp(torch.abs(s) - c)


@register("cog-attention")
def cog() -> Weighted:
    """The paper keeps plain softmax in the first and last layer: `Decoder(["softmax", *["cog-attention"] * n, "softmax"], layers=n + 2)`."""
    return Weighted(normalizer=RowLocal(signed, strength, shift="maxabs"))


@dataclass(frozen=True)
class SignReport(HeadResult):
    """A number a head. negative: the share of the absolute weight that is negative. copying: sum of lambda / sum of |lambda| over the eigenvalues
    of W_V W_O, 1 where the head writes what it reads, -1 where it writes its opposite. collapse (layers + 1,): the mean distance of two tokens over
    their norm, in the embeddings and behind each layer, which falls towards 0 as representations collapse."""

    negative: HeadTable
    copying: HeadTable
    collapse: Tensor


@torch.no_grad()
def sign_report(model: nn.Module, ids: Tensor) -> SignReport:
    """What signs do in a tapped decoder on tokens ids (B, L): who deletes, by its weights or by its OV circuit, and whether tokens collapse."""
    with read(model, ["weights", "residual_in", "residual_out"]) as seen:
        model(ids)
    negative = [(-w.clamp_max(0)).sum((0, 2, 3)) / w.abs().sum((0, 2, 3)).clamp_min(1e-300) for _, w in seen.items("weights")]
    copying = []
    for site in sites(model):
        own = head_weights(site)
        values = torch.linalg.eigvals((own.wo @ own.wv).double())  # those of W_V W_O that are not 0
        copying.append(values.real.sum(-1) / values.abs().sum(-1).clamp_min(1e-300))
    streams = [next(x for _, x in seen.items("residual_in")), *(x for _, x in seen.items("residual_out"))]
    collapse = torch.tensor([token_distance(x) for x in streams], dtype=torch.float64)
    return SignReport(table_of(negative, "negative"), table_of(copying, "copying"), collapse)
