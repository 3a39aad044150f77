"""DR-RL: attention of a rank, and the numbers that its policy and its bounds are made of."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

from regard.nn.low_rank_scores import energy_ratio, output_bound, spectral_norm, tail
from regard.zoo.systems.dr_rl import DynamicRankAttention

NAMES = [(rf"^{ours}\.", f"{theirs}_proj.") for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))]


def made_of(g: Vectors) -> tuple[DynamicRankAttention, dict[str, torch.nn.Parameter]]:
    made = DynamicRankAttention(g["dim"], g["heads"], (1, 2, 3), segment=None, svd_gradient=True, dropout=0.0).to(g.dtype)
    return made, g.fill(made, *NAMES, without="policy")


@case("c0", "c1", "c2", "c3")
def layer(g: Vectors) -> None:
    made, parameters = made_of(g)
    g.layer(lambda x: made(x, ranks=torch.full((len(x), 1), g["rank"])), **parameters)


@case("c4")
def padded(g: Vectors) -> None:
    made, parameters = made_of(g)
    keep = g("keep").bool()
    g.layer(lambda x: made(x, keep=keep, ranks=torch.full((len(x), 1), g["rank"])) * keep[..., None], **parameters)


@case("c5")
def statistics(g: Vectors) -> None:
    g.same(made_of(g)[0].statistics(), "out")


@case("e0")
def bounds(g: Vectors) -> None:
    x, start = g("x"), g("start")
    sigma = torch.linalg.svdvals(x)
    g.same(energy_ratio(sigma, 2), "out")
    g.same(spectral_norm(x, 3, start), "power3")
    g.same(spectral_norm(x, 0, start), "power0")
    g.same(tail(sigma, 1, 3), "tail13")
    g.same(tail(sigma, 4, 2), "tail42")
    g.same(output_bound(torch.full_like(sigma[..., 0], 0.7), x), "sensitivity")
