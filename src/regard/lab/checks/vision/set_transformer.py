"""Checks of set-transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn, joined, split
from regard.lab.memory import largest_tensor
from regard.lab.verification import check
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


def max_regression(attention: bool, steps: int = 300) -> float:
    """Mean absolute error of predicting the maximum of 1..10 reals in [0, 100], after a short training run."""
    torch.manual_seed(1)

    def draw(batch: int) -> tuple[Tensor, Tensor, Tensor]:
        x = 100 * torch.rand(batch, 10, 1)
        keep = torch.arange(10) < torch.randint(1, 11, (batch, 1))
        return x / 100, keep, x.masked_fill(~keep[..., None], -1).amax(1) / 100

    encoder: nn.Module
    head: nn.Module
    if attention:
        encoder, pool, head = SAB(1, 64, 4), PMA(64, 4, 1), nn.Linear(64, 1)
        model = nn.ModuleList([encoder, pool, head])
    else:
        encoder, head = (
            nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()),
            nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)),
        )
        model = nn.ModuleList([encoder, head])

    def predict(x: Tensor, keep: Tensor) -> Tensor:
        if attention:
            return head(pool(encoder(x, keep), keep))[:, 0]
        h = encoder(x) * keep[..., None]
        return head(h.sum(1) / keep.sum(1, keepdim=True))

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        x, keep, y = draw(128)
        optimizer.zero_grad()
        (predict(x, keep) - y).abs().mean().backward()
        optimizer.step()
    with torch.no_grad():
        x, keep, y = draw(2000)
        return float((predict(x, keep) - y).abs().mean()) * 100


@check(
    "set-transformer",
    "mean absolute error of predicting the maximum of 1..10 numbers in [0, 100], after a short run of SAB + PMA",
    below=5.0,
    control="the mean-pooled net itself",
)
def _() -> tuple[float, float]:
    return max_regression(True), max_regression(False)


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
        h = block_by_hand(model.mix.mab, h, h, s)
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
