"""Checks of draftattention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra.permute import tiles
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import masked_softmax
from regard.lab.planted import relative_error
from regard.lab.verification import check
from regard.zoo.sparse.draftattention import schedule


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


def drafted_pairs(
    q: Tensor, k: Tensor, grid: tuple[int, int, int], pool: tuple[int, int], sparsity: float, every_row: bool, text: int = 0
) -> Tensor:
    """(H, L, L) bool, tokens in their own order: the floor(sparsity n) smallest of a head's n pooled probabilities are left out."""
    _, height, width = grid
    visual = math.prod(grid)
    patch = [(n // (height * width), n // width % height // pool[0], n % width // pool[1]) for n in range(visual)]
    names = sorted(set(patch))
    inside = [[n for n in range(visual) if patch[n] == name] for name in names]
    own = torch.tensor([names.index(name) for name in patch])
    pairs = torch.ones(q.shape[1], visual + text, visual + text, dtype=torch.bool)
    for h in range(q.shape[1]):
        keys = k[0, h // (q.shape[1] // k.shape[1])]
        draft = torch.stack(
            [torch.stack([q[0, h, u].mean(0) @ keys[w].mean(0) / math.sqrt(q.shape[-1]) for w in inside]).softmax(0) for u in inside]
        )
        entries = sorted((float(draft[u, w]), u, w) for u in range(len(names)) for w in range(len(names)))
        keep = torch.zeros(len(names), len(names), dtype=torch.bool)
        for _, u, w in entries[math.floor(sparsity * len(entries)) :]:
            keep[u, w] = True
        if every_row:
            keep[torch.arange(len(names)), draft.argmax(-1)] = True
        pairs[h, :visual, :visual] = keep[own[:, None], own]
    return pairs


@check(
    "draftattention",
    "output equals softmax over the pairs of a loop over patches in the original order: budgets of a whole map, text, grouped heads; sparsity 0 dense",
    below=1e-12,
    control="without a block for every row",
)
def _() -> tuple[float, float]:
    q, k, v = 3 * torch.randn(1, 4, 133, 16, dtype=F64), *(torch.randn(1, 2, 133, 16, dtype=F64) for _ in range(2))
    grid, pool, own = (2, 8, 8), (2, 4), 0.0
    for sparsity, every_row in ((0.0, True), (0.6, False), (0.77, True), (0.95, True)):
        settings = {"grid": grid, "pool": pool, "sparsity": sparsity}
        truth = masked_softmax(q, k, v, drafted_pairs(q, k, grid, pool, sparsity, every_row, 5))
        own = max(own, naive.gap(attend(q, k, v, get("draftattention", every_row=every_row, text=5, **settings)), truth))
    line, rows = [x[:, :, :120] for x in (q, k, v)], drafted_pairs(q[:, :, :120], k[:, :, :120], (15, 2, 4), (2, 4), 0.5, True)
    own = max(own, naive.gap(attend(*line, get("draftattention", pool=(2, 4), sparsity=0.5)), masked_softmax(*line, rows)))
    return own, naive.gap(attend(q, k, v, get("draftattention", every_row=False, text=5, **settings)), truth)


@check(
    "draftattention",
    "smooth latents, a quarter kept: relative error over that of raster blocks, and over 0.6 of a random map's: the larger",
    below=1,
    control="the random map in its place",
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
    bar = min(sum(raster), 0.6 * sum(random))
    return sum(own) / bar, sum(random) / bar


@check(
    "draftattention",
    "the schedule over steps and layers: (step, layer) pairs of 4 x 4 whose output is not dense where it should be, or is where it should not",
    below=0,
    control="a schedule without dense steps",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 1, 64, 8, dtype=F64) for _ in range(3))
    truth = attend(q, k, v)

    def off(steps: int) -> float:
        wrong = 0
        for step in range(4):
            for layer in range(4):
                mechanism = schedule(step, layer, dense_steps=steps, dense_layers=1, grid=(1, 8, 8), pool=(4, 4))
                wrong += (naive.gap(attend(q, k, v, mechanism), truth) < 1e-12) != (step < 2 or layer < 1)
        return float(wrong)

    return off(2), off(0)
