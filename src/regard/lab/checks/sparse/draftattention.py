"""Checks of draftattention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Chosen, Full, bind
from regard.algebra.permute import tiles
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import s_attend, selection_of
from regard.lab.planted import relative_error
from regard.lab.verification import check
from regard.zoo.sparse.draftattention import draft_plan


@check(
    "draftattention",
    "every 16 consecutive reordered tokens are one 4 x 4 patch of one frame, and the order undoes",
    below=0,
    control="raster blocks",
)
def _() -> tuple[float, float]:
    order = tiles((4, 16, 16), (1, 4, 4), 5)

    def mixed(place: Tensor) -> float:
        blocks = place[:1024].reshape(-1, 16)
        patch = blocks // 256 * 16 + blocks % 256 // 16 // 4 * 4 + blocks % 16 // 4
        return float((patch != patch[:, :1]).sum())

    x = torch.arange(1029.0)[:, None]
    return mixed(order.order) + naive.gap(order.invert(order.apply(x)), x), mixed(torch.arange(1029))


def smooth(seed: int, dim: int = 32) -> Tensor:
    """Noise on a 4 x 16 x 16 grid averaged three times over 3 x 3 x 3, of unit variance: (1, 1, 1024, dim)."""
    x = torch.randn(dim, 1, 4, 16, 16, dtype=F64, generator=torch.Generator().manual_seed(seed))
    for _ in range(3):
        x = torch.nn.functional.avg_pool3d(torch.nn.functional.pad(x, (1,) * 6, mode="replicate"), 3, 1)
    return (x / x.std()).flatten(1).T[None, None]


@check(
    "draftattention",
    "sparsity 0 is dense attention, text included; 0.75 equals dense attention under the token mask in the original order",
    below=1e-12,
    control="output not put back",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 1, 1029, 32, dtype=F64) for _ in range(3))
    settings = {"grid": (4, 16, 16), "pool": (4, 4), "text": 5}
    dense = naive.gap(attend(q, k, v, get("draftattention", sparsity=0.0, **settings)), attend(q, k, v))
    order = tiles((4, 16, 16), (1, 4, 4), 5)
    plan = Chosen(bind(draft_plan, size=16, visual=1024, sparsity=0.75, every_row=True))
    keep = (
        selection_of(plan, order.apply(q), order.apply(k), Full())
        .keep.repeat_interleave(16, -2)
        .repeat_interleave(16, -1)[0, 0, :1029, :1029]
    )
    original = torch.zeros(1029, 1029, dtype=torch.bool)
    original[order.order[:, None], order.order] = keep
    out = attend(q, k, v, get("draftattention", sparsity=0.75, **settings))
    truth = s_attend(q, k, v, original[None])
    return max(dense, naive.gap(out, truth)), naive.gap(order.apply(out), truth)


@check(
    "draftattention",
    "smooth latents, a quarter kept: relative error over a random map's, and under raster blocks'",
    below=0.6,
    control="the random map",
)
def _() -> tuple[float, float]:
    own, random, raster = [], [], []
    for seed in range(2):
        x, v = smooth(2 * seed), smooth(2 * seed + 1)
        q = k = 1.2 * x  # what a projection of one latent gives: like patches attend to like
        truth = attend(q, k, v)
        own.append(relative_error(attend(q, k, v, get("draftattention", grid=(4, 16, 16), pool=(4, 4))), truth))
        raster.append(relative_error(attend(q, k, v, get("draftattention", pool=(4, 4))), truth))
        keep = torch.rand(64, 64).argsort(-1).argsort(-1) < 16
        random.append(relative_error(attend(q, k, v, mask=keep.repeat_interleave(16, 0).repeat_interleave(16, 1)), truth))
    return sum(own) / sum(random) if sum(own) < sum(raster) else math.inf, 1.0
