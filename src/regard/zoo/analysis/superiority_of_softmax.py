"""Why softmax is ahead of linear attention: one strong key stands out among any number of others (id 21; Deng et al., 2023).

Scores s_j = c log n, and in D1 one key of a log n with the marker value 1.   softmax: its weight n^a / (n^a + (n - 1) n^c) -> 1 for a > 1 + c;
s_j / sum s, (1 + s_j) / sum (1 + s), elu + 1: of order 1 / n.   A neuron relu(out - tau) tells D0 from D1.

The paper's own constants were not at hand: the families are this row's instance of its construction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.plots import Plot, figure
from regard.results import Result

RATES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda s: (s - s.amax(-1, keepdim=True)).exp(),
    "linear": lambda s: s,
    "taylor": lambda s: 1 + s,
    "elu": lambda s: F.elu(s) + 1,
}


def weights(scores: Tensor, normalizer: str) -> Tensor:
    """scores (..., n) -> weights that sum to one: "softmax", "linear", "taylor" (1 + s) or "elu" (elu + 1)."""
    if normalizer not in RATES:
        raise RegardError(f"normalizer={normalizer!r}; expected one of {', '.join(RATES)}")
    rate = RATES[normalizer](scores)
    return rate / rate.sum(-1, keepdim=True)


def families(
    count: int,
    n: int,
    strong: bool,
    *,
    a: float = 3.0,
    c: float = 0.5,
    jitter: float = 0.05,
    dim: int = 8,
    cross: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """(queries (count, m, dim), keys (count, n, dim)) of D1 (strong) or D0. Channel 0 of a key is its score over log n, channel 1 the marker,
    channel 2 of a query is 1, the rest noise. cross: one query of a sequence of its own, else the keys themselves, the last of which asks."""
    if n < 3 or dim < 3 or not a > 1 + c:
        raise RegardError(
            f"n={n}, dim={dim}, a={a}, c={c}: expected n >= 3, dim >= 3 and a > 1 + c, without which no head tells them apart"
        )
    generator = torch.Generator().manual_seed(seed)
    keys = 0.1 * torch.randn(count, n, dim, generator=generator, dtype=torch.float64)
    keys[..., 0] = c + jitter * (2 * torch.rand(count, n, generator=generator, dtype=torch.float64) - 1) / math.log(n)
    keys[..., 1] = 0.0
    if strong:
        place = torch.randint(n - 1, (count, 1), generator=generator)
        keys[..., 0].scatter_(1, place, a)
        keys[..., 1].scatter_(1, place, 1.0)
    if not cross:
        keys[..., 2] = 0.0
        keys[:, -1, 2] = 1.0
        return keys, keys
    query = 0.1 * torch.randn(count, 1, dim, generator=generator, dtype=torch.float64)
    query[..., 2] = 1.0
    return query, keys


def head_output(queries: Tensor, keys: Tensor, normalizer: str, scale: Tensor | float = 1.0) -> Tensor:
    """(count,): the marker that the last query's head reads, scores scale log n x_q W x_k with W reading channel 2 against channel 0."""
    w = torch.zeros(queries.shape[-1], keys.shape[-1], dtype=keys.dtype)
    w[2, 0] = 1.0
    scores = scale * math.log(keys.shape[1]) * torch.einsum("bd,de,bne->bn", queries[:, -1], w, keys)
    return (weights(scores, normalizer) * keys[..., 1]).sum(-1)


@dataclass(frozen=True)
class Margins(Result):
    """margin[normalizer]: by length, the least output on D1 minus the greatest on D0; accuracy: of the best threshold (softmax: tau) behind
    readout noise."""

    lengths: tuple[int, ...]
    margin: dict[str, tuple[float, ...]]
    accuracy: dict[str, tuple[float, ...]]

    def plot(self) -> Plot:
        """Margins by length, log axes."""
        lines = {name: list(zip(map(float, self.lengths), y, strict=True)) for name, y in self.margin.items()}
        return figure("One strong key", "keys", "margin", lines, log_x=True, log_y=True)

    def slope(self, normalizer: str) -> float:
        """d log margin / d log n between the first and the last length."""
        y = self.margin[normalizer]
        return math.log(y[-1] / y[0]) / math.log(self.lengths[-1] / self.lengths[0])


def best_threshold(low: Tensor, high: Tensor) -> float:
    """Accuracy of the best relu(out - tau) > 0 that tells high from low."""
    values = torch.cat((low, high)).sort().values
    return max(float(((low <= tau).double().mean() + (high > tau).double().mean()) / 2) for tau in values.tolist())


@register("superiority-of-softmax", kind="experiment")
def softmax_vs_linear(
    lengths: Sequence[int] = (64, 256, 1024, 4096),
    normalizers: Sequence[str] = ("softmax", "linear", "taylor"),
    *,
    draws: int = 200,
    noise: float = 0.05,
    tau: float = 0.5,
    seed: int = 0,
    cross: bool = False,
    a: float = 3.0,
    c: float = 0.5,
) -> Margins:
    """Margins and accuracies of single heads on D0 against D1, by length. noise: of the readout; softmax's threshold is `tau` at every length,
    the others take the best there is."""
    margin: dict[str, list[float]] = {name: [] for name in normalizers}
    accuracy: dict[str, list[float]] = {name: [] for name in normalizers}
    generator = torch.Generator().manual_seed(seed + 1)
    for n in lengths:
        pair = [families(draws, n, strong, a=a, c=c, cross=cross, seed=seed + strong) for strong in (False, True)]
        for name in normalizers:
            low, high = (head_output(*x, name) for x in pair)
            margin[name].append(float(high.min() - low.max()))
            low, high = (x + noise * torch.randn(draws, generator=generator, dtype=x.dtype) for x in (low, high))
            fixed = float(((low <= tau).double().mean() + (high > tau).double().mean()) / 2)
            accuracy[name].append(fixed if name == "softmax" else best_threshold(low, high))
    return Margins(tuple(lengths), {k: tuple(v) for k, v in margin.items()}, {k: tuple(v) for k, v in accuracy.items()})


def trained_accuracy(
    normalizer: str, train: int = 256, test: int = 1024, *, noise: float = 0.05, steps: int = 200, draws: int = 64, seed: int = 0
) -> tuple[float, float]:
    """The head's scale and the neuron's threshold and slope learned on sequences of `train` keys with readout noise: (accuracy there, accuracy
    on `test` keys)."""
    scale, tau, sharp = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.5, 0.1, 3.0))
    optimizer = torch.optim.Adam([scale, tau, sharp], 0.05)
    generator = torch.Generator().manual_seed(seed)

    def margins(n: int, at: int) -> Tensor:
        outs = [head_output(*families(draws, n, strong, seed=at + strong), normalizer, scale) for strong in (False, True)]
        noisy = [x + noise * torch.randn(draws, generator=generator, dtype=x.dtype) - tau for x in outs]
        return torch.cat((-noisy[0], noisy[1]))

    for step in range(steps):
        loss = F.softplus(-sharp * margins(train, seed + 10 * step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return tuple(float((margins(n, 10**6) > 0).double().mean()) for n in (train, test))  # type: ignore[return-value]
