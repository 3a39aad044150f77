"""Checks of set-transformer."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn, joined, split
from regard.lab.checks.shared.training import middle
from regard.lab.memory import largest_tensor
from regard.lab.verification import check
from regard.tasks import sets
from regard.tasks.sets import Sets
from regard.zoo.vision.set_transformer import ISAB, MAB, PMA, SAB, SetTransformer


def set_input() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 11, 6, dtype=F64)
    return x, torch.randperm(11)


@check(
    "set-transformer",
    "permuting the set permutes SAB and ISAB outputs and leaves PMA unchanged",
    below=1e-12,
    control="with positions added",
)
def _() -> tuple[float, float]:
    x, order = set_input()
    layers: list[nn.Module] = [SAB(6, 8, 2).double(), ISAB(6, 8, 2, 4).double()]
    pool = nn.Sequential(nn.Linear(6, 8), PMA(8, 2, 3)).double()
    place = torch.arange(11, dtype=F64)[:, None] / 11

    def off(positions: Tensor | float) -> float:
        gaps = [naive.gap(layer(x[:, order] + positions), layer(x + positions)[:, order]) for layer in layers]
        return max(*gaps, naive.gap(pool(x[:, order] + positions), pool(x + positions)))

    return off(0.0), off(place)


@check("set-transformer", "padding with masked junk (NaN included) changes nothing", below=1e-12, control="padding not masked")
def _() -> tuple[float, float]:
    x, _ = set_input()
    model = SetTransformer(6, 2, dim=8, heads=2, inducing=4).double()
    truth = model(x)
    keep = torch.ones(3, 14, dtype=torch.bool)
    keep[:, 11:] = False
    junk = torch.cat((x, torch.full((3, 3, 6), 1e3, dtype=F64)), 1)
    poisoned = torch.cat((x, torch.full((3, 3, 6), math.nan, dtype=F64)), 1)
    encoded = model.encoder[0](poisoned, keep)[:, :11]
    clean = model.encoder[0](x)
    return max(naive.gap(model(junk, keep), truth), naive.gap(encoded, clean)), naive.gap(model(junk), truth)


@check(
    "set-transformer",
    "ISAB never builds n x n: largest tensor at n = 1024, m = 16, over n^2",
    below=0.1,
    control="attention of the set to itself, written out",
)
def _() -> tuple[float, float]:
    x = torch.randn(1, 1024, 16)
    layer = ISAB(16, 16, 2, 16)
    with torch.no_grad():
        own = largest_tensor(lambda: layer(x))
        whole = largest_tensor(lambda: (x @ x.transpose(1, 2)).softmax(-1) @ x)
    return own / 1024**2, whole / 1024**2


class PooledRows(nn.Module):
    """Attention removed: a net of each item, the mean over the set, a net of that; (B, n, dim_in) -> (B, outputs, dim_out)."""

    def __init__(self, dim_in: int, dim_out: int, outputs: int = 1, dim: int = 64):
        super().__init__()
        widths = (dim_in, dim, dim, dim)
        self.each = nn.Sequential(*(part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())))
        self.whole = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, outputs * dim_out))
        self.outputs = outputs

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        h = (self.each(x) * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)
        return self.whole(h).unflatten(-1, (self.outputs, -1))


class EachItem(nn.Module):
    """A number an item: (B, n, dim_in) -> (B, n), -1e9 where there is none; two SAB, or, attention removed, a net of each item."""

    def __init__(self, dim_in: int, attention: bool):
        super().__init__()
        self.blocks = nn.ModuleList([SAB(dim_in, 32, 4), SAB(32, 32, 4)] if attention else [])
        self.rows = nn.Identity() if attention else nn.Sequential(nn.Linear(dim_in, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = self.rows(x)
        for block in self.blocks:
            x = block(x, keep)
        return self.head(x)[..., 0].masked_fill(~keep, -1e9)  # type: ignore[no-any-return]


def learned(
    make: Callable[[], nn.Module],
    draw: Callable[[int, torch.Generator], Sets],
    score: Callable[[Tensor, Sets], Tensor],
    loss: Callable[[Tensor, Sets], Tensor],
    steps: int,
    lr: float,
    batch: int,
    seed: int,
) -> float:
    """The score on 1000 new sets after `steps` steps of Adam under a one-cycle rate."""
    torch.manual_seed(seed)
    model, generator = make(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        drawn = draw(batch, generator)
        optimizer.zero_grad()
        loss(model(drawn.x, drawn.keep), drawn).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        drawn = draw(1000, torch.Generator().manual_seed(10_000))
        return float(score(model(drawn.x, drawn.keep), drawn))


@check(
    "set-transformer",
    "mean absolute error of the largest of 1 to 10 numbers from 0 to 100, 200 steps (median of 3 seeds)",
    below=8.0,
    control="the mean of a net of each item, which stays near the best guess from the mean",
)
def _() -> tuple[float, float]:
    def error(out: Tensor, drawn: Sets) -> Tensor:
        return (out[:, 0, 0] - drawn.answer).abs().mean()

    def run(make: Callable[[], nn.Module], seed: int) -> float:
        return 100 * learned(make, lambda count, g: sets.maxima(count, g, top=1.0), error, error, 200, 3e-3, 64, seed)

    return middle(lambda seed: run(lambda: SetTransformer(1, 1, dim=32, inducing=0), seed)), run(lambda: PooledRows(1, 1), 0)


@check(
    "set-transformer",
    "share of sets of 4 to 8 items of 6 kinds of which it says how many kinds they hold, 200 steps (median of 3 seeds)",
    above=0.7,
    control="the mean of a net of each item",
)
def _() -> tuple[float, float]:
    def right(out: Tensor, drawn: Sets) -> Tensor:
        return (out[:, 0].argmax(-1) + 1 == drawn.answer).double().mean()

    def loss(out: Tensor, drawn: Sets) -> Tensor:
        return F.cross_entropy(out[:, 0], drawn.answer - 1)

    def draw(count: int, generator: torch.Generator) -> Sets:
        return sets.unique_items(count, generator, least=4, most=8, kinds=6, features=6, noise=0.1)

    def run(make: Callable[[], nn.Module], seed: int) -> float:
        return learned(make, draw, right, loss, 200, 5e-3, 64, seed)

    return middle(lambda seed: run(lambda: SetTransformer(6, 8, dim=32, inducing=0), seed)), run(lambda: PooledRows(6, 8), 0)


@check(
    "set-transformer",
    "log likelihood a point of the mixtures of two Gaussians that it gives sets of 8 to 16 points, 8 inducing points, 150 steps (median of 3 seeds)",
    above=-0.8,
    control="the mean of a net of each item",
)
def _() -> tuple[float, float]:
    def told(out: Tensor, drawn: Sets) -> Tensor:
        return sets.mixture_log_likelihood(drawn.x, drawn.keep, out).mean()

    def draw(count: int, generator: torch.Generator) -> Sets:
        return sets.clusters(count, generator, least=8, most=16, groups=2, spread=0.1, reach=2.0)

    def run(make: Callable[[], nn.Module], seed: int) -> float:
        return learned(make, draw, told, lambda out, drawn: -told(out, drawn), 150, 1e-2, 32, seed)

    return middle(lambda seed: run(lambda: SetTransformer(2, 5, dim=32, inducing=8, outputs=2), seed)), run(lambda: PooledRows(2, 5, 2), 0)


@check(
    "set-transformer",
    "share of sets of 5 to 8 items, all of one kind but one, in which two SAB find it, 80 steps",
    above=0.8,
    control="a net of each item alone, which ranks kinds and is right half the time at best",
)
def _() -> tuple[float, float]:
    def run(attention: bool) -> float:
        return learned(
            lambda: EachItem(8, attention),
            lambda count, g: sets.odd_one(count, g, features=8, noise=0.3),
            lambda out, drawn: (out.argmax(1) == drawn.answer).double().mean(),
            lambda out, drawn: F.cross_entropy(out, drawn.answer),
            80,
            5e-3,
            32,
            0,
        )

    return run(True), run(False)


def block_by_hand(mab: MAB, x: Tensor, y: Tensor, scale: float, keep: Tensor | None = None) -> Tensor:
    """LN(h + relu(h W_o)), h = LN(x W_q + softmax(scale x W_q (y W_k)^T) y W_v) of heads side by side."""
    projected = x @ mab.q.weight.T + mab.q.bias
    q, k, v = split(projected, mab.heads), *(split(y @ p.weight.T + p.bias, mab.heads) for p in (mab.k, mab.v))
    s = scale * q @ k.mT
    s = s if keep is None else s.masked_fill(~keep[:, None, None], -math.inf)

    def normed(h: Tensor, norm: nn.Module) -> Tensor:
        if isinstance(norm, nn.Identity):
            return h
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias  # type: ignore[no-any-return, operator]

    h = normed(projected + joined(s.softmax(-1) @ v), mab.norm1)
    return normed(h + (h @ mab.out.weight.T + mab.out.bias).clamp_min(0), mab.norm2)


@check(
    "set-transformer",
    "MAB with both scales, with norms and without, and SAB, ISAB, PMA and the model made of it == by hand, on sets of unequal size",
    below=1e-10,
    control="the other scale",
)
def _() -> tuple[float, float]:
    (x, _), y, own, other = set_input(), torch.randn(3, 9, 5, dtype=F64), [], math.inf
    keep = torch.arange(9) < torch.tensor([[9], [4], [6]])
    for norm in (False, True):
        for paper in (False, True):
            mab = drawn(MAB(6, 5, 8, 2, norm, paper_scale=paper))
            own.append(naive.gap(mab(x, y, keep), block_by_hand(mab, x, y, (4 if paper else 8) ** -0.5, keep)))
            other = min(other, naive.gap(mab(x, y, keep), block_by_hand(mab, x, y, (8 if paper else 4) ** -0.5, keep)))
        s = 8**-0.5
        model, seen = (
            drawn(SetTransformer(6, 2, dim=8, heads=2, inducing=3, outputs=2, norm=norm)),
            torch.arange(11) < torch.tensor([[11], [5], [8]]),
        )
        h = x
        for layer in model.encoder:
            inner = block_by_hand(layer.gather, layer.points.expand(3, -1, -1), h, s, seen)  # type: ignore[arg-type, operator, union-attr]
            h = block_by_hand(layer.spread, h, inner, s)  # type: ignore[arg-type]
        h = block_by_hand(model.pool.mab, model.pool.seeds.expand(3, -1, -1), h, s, seen)
        h = block_by_hand(model.mix[0].mab, h, h, s)
        own.append(naive.gap(model(x, seen), h @ model.head.weight.T + model.head.bias))
    pool, sab = drawn(PMA(8, 2, 3, rff=True)), drawn(SetTransformer(6, 1, dim=8, heads=2, inducing=0))
    z = torch.randn(2, 7, 8, dtype=F64)
    first = pool.rff[0]  # type: ignore[index]
    own.append(naive.gap(pool(z), block_by_hand(pool.mab, pool.seeds.expand(2, -1, -1), (z @ first.weight.T + first.bias).clamp_min(0), s)))  # type: ignore[operator]
    one = sab.encoder[0]
    own.append(naive.gap(one(x), block_by_hand(one.mab, x, x, s)))  # type: ignore[arg-type]
    edge = (6 / (3 * 8 + 8)) ** 0.5  # Xavier's range of seeds (1, 3, 8), as fans of 24 and 8 count
    own.append(float(PMA(8, 2, 3).seeds.detach().abs().max() > edge))
    return max(own), other
