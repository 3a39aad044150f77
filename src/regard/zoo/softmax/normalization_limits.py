"""What normalization can and cannot tell apart: dispersion, separation, geometry and gradients of attention (id 1; Mudarisov et al., 2025).

alpha_i = F(l_i) / sum_j F(l_j).  If |l| <= a and F does not depend on L, every weight lies between C1 / L and C2 / L.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.algebra import Dot, Hybrid, Weighted
from regard.catalog import get
from regard.catalog.registry import register
from regard.engine import weights
from regard.engine.door import attend
from regard.errors import RegardError
from regard.plots import figure


@dataclass(frozen=True)
class Limits:
    """largest, smallest: weights; bounds: softmax's bounds on them, from the spread of the logits. separation: d~ of the top N, (N's,), its
    bound, and its expectation for random sets. distinct: share of the top N that can be told from the rest. jacobian: spectral norm of
    d alpha / d l; jacobian_bound: softmax's 1 / (2 T)."""

    largest: float
    smallest: float
    bounds: tuple[float, float]
    tops: tuple[int, ...]
    separation: tuple[float, ...]
    separation_bound: tuple[float, ...]
    random_separation: tuple[float, ...]
    distinct: tuple[float, ...]
    jacobian: float
    jacobian_bound: float

    def plot(self) -> str:
        """Separation of the top N, its bound and its expectation for random sets, as an SVG."""
        lines = {"separation": self.separation, "bound": self.separation_bound, "random sets": self.random_separation}
        return figure(
            "Separation of the top N",
            "N",
            "separation",
            {name: list(zip(map(float, self.tops), y, strict=True)) for name, y in lines.items()},
        )


def normalised(logits: Tensor, normalizer: str | Weighted | Callable[[Tensor], Tensor], temperature: float) -> Tensor:
    """Weights (L,) of logits (L,), l / T: of a mechanism's normalizer, with its scaling of dot products (SSMax) but without positions, masks and
    scores of another kind; or F(l / T) / sum F for a plain positive function F."""
    x = logits / temperature
    if callable(normalizer) and not isinstance(normalizer, Weighted):
        f = normalizer(x)
        return f / f.sum()
    described = get(normalizer) if isinstance(normalizer, str) else normalizer
    one, keys = x.new_ones(1, 1, 1, 1), x[None, None, :, None]
    if isinstance(described, Hybrid):  # a blend has no one matrix of weights: read it off identity values
        eye = torch.eye(len(x), dtype=x.dtype)[None, None]
        return attend(x[None, None, None], eye, eye, described, scale=1.0)[0, 0, 0]
    if not isinstance(described, Weighted):
        raise RegardError(f"normalizer={normalizer!r} has no weights of pairs; expected a mechanism that has, or a function F")
    # The logits are given: positions, masks and scores other than scaled dot products, which would make them, have no part.
    dot = isinstance(described.score, Dot) and not described.score.unit
    found = weights(one, keys, Weighted(**({"score": described.score} if dot else {}), normalizer=described.normalizer), scale=1.0)  # type: ignore[arg-type]
    assert found is not None
    return found[0, 0, 0]


def dispersion_bounds(spread: float, length: int, temperature: float = 1.0) -> tuple[float, float]:
    """Softmax's least and greatest weight when logits lie in [-spread, spread]: 1 / (1 + (L - 1) e^(+-2 spread / T))."""
    return tuple(1 / (1 + (length - 1) * math.exp(sign * 2 * spread / temperature)) for sign in (1, -1))  # type: ignore[return-value]


def separation(weights: Tensor, tokens: Tensor, chosen: Tensor) -> Tensor:
    """d~ = sum_{j not chosen} |s - alpha_j x_j|, s = sum_{i chosen} alpha_i x_i; chosen (L,) bool."""
    terms = weights[:, None] * tokens
    return (terms[chosen].sum(0) - terms[~chosen]).norm(dim=-1).sum()


def separation_bound(weights: Tensor, tokens: Tensor, chosen: Tensor) -> Tensor:
    """sum_{j not chosen} alpha_j |x_j| + (L - N) |s|."""
    terms = weights[:, None] * tokens
    return terms[~chosen].norm(dim=-1).sum() + (~chosen).sum() * terms[chosen].sum(0).norm()


def distinguishable(weights: Tensor, tokens: Tensor, chosen: Tensor, radius: float) -> float:
    """N_s / N: the share of chosen tokens whose alpha_i x_i lies within `radius` of s, where no other token's does."""
    terms = weights[:, None] * tokens
    gap = (terms - terms[chosen].sum(0)).norm(dim=-1)
    return float((gap[chosen] <= radius).double().mean()) if not bool((gap[~chosen] <= radius).any()) else 0.0


def softmax_jacobian(weights: Tensor, temperature: float) -> Tensor:
    """(diag(alpha) - alpha alpha^T) / T."""
    return (torch.diag(weights) - torch.outer(weights, weights)) / temperature


@register("normalization-limits", kind="experiment")
def attention_limits(
    logits: Tensor,
    tokens: Tensor | None = None,
    normalizer: str | Weighted | Callable[[Tensor], Tensor] = "softmax",
    *,
    temperature: float = 1.0,
    tops: tuple[int, ...] = (1, 4, 16),
    radius: float | None = None,
    draws: int = 32,
    jacobian: bool = True,
    seed: int = 0,
) -> Limits:
    """logits (L,), or the log of a recorded map's row; tokens (L, dim) (None: random points on a sphere of radius sqrt(dim), dim = 64). normalizer: a name, a description, or a
    positive function F. radius: None is twice the mean |alpha x|. draws: random sets for the expected separation. jacobian costs O(L^2)."""
    if logits.dim() != 1 or (tokens is not None and (tokens.dim() != 2 or len(tokens) != len(logits))):
        raise RegardError(
            f"logits {tuple(logits.shape)}, tokens {None if tokens is None else tuple(tokens.shape)}: expected (L,) and (L, dim)"
        )
    if not bool(logits.isfinite().all()):
        raise RegardError("logits hold entries that are not finite; expected finite ones (leave masked keys out)")
    length, generator = len(logits), torch.Generator().manual_seed(seed)
    if tokens is None:
        tokens = torch.nn.functional.normalize(torch.randn(length, 64, generator=generator, dtype=logits.dtype), dim=-1) * 8
    alpha = normalised(logits, normalizer, temperature)
    order, rows = alpha.argsort(descending=True), []
    reach = 2 * float((alpha[:, None] * tokens).norm(dim=-1).mean()) if radius is None else radius
    for n in tops:
        if not 1 <= n <= length:
            raise RegardError(f"tops={tops}: expected numbers from 1 to L = {length}")
        chosen = torch.zeros(length, dtype=torch.bool)
        chosen[order[:n]] = True
        sets = [
            torch.zeros(length, dtype=torch.bool).index_fill_(0, torch.randperm(length, generator=generator)[:n], True)
            for _ in range(draws)
        ]
        expected = sum(float(separation(alpha, tokens, one)) for one in sets) / draws
        rows.append(
            (
                float(separation(alpha, tokens, chosen)),
                float(separation_bound(alpha, tokens, chosen)),
                expected,
                distinguishable(alpha, tokens, chosen, reach),
            )
        )
    spectral = math.nan
    if jacobian:
        matrix = torch.autograd.functional.jacobian(lambda x: normalised(x, normalizer, temperature), logits)
        spectral = float(torch.linalg.matrix_norm(matrix, 2))
    near, far, random, share = (tuple(column) for column in zip(*rows, strict=True))
    bounds = dispersion_bounds(float(logits.abs().max()), length, temperature)
    return Limits(float(alpha.max()), float(alpha.min()), bounds, tuple(tops), near, far, random, share, spectral, 1 / (2 * temperature))


def critical_top(weights: Tensor, tokens: Tensor, tops: tuple[int, ...], alpha: float = 0.01, seed: int = 0) -> int | None:
    """The least N of `tops` at which d~ of the top N no longer differs from that of random sets, by a two-sample Kolmogorov-Smirnov test over
    the rows of an attention map (rows, L); None where it always differs."""
    generator = torch.Generator().manual_seed(seed)
    limit = math.sqrt(-math.log(alpha / 2) / 2) * math.sqrt(2 / len(weights))
    for n in tops:
        found: list[list[float]] = [[], []]
        for row in weights:
            for into, order in zip(found, (row.argsort(descending=True), torch.randperm(len(row), generator=generator)), strict=True):
                chosen = torch.zeros(len(row), dtype=torch.bool).index_fill_(0, order[:n], True)
                into.append(float(separation(row, tokens, chosen)))
        both = torch.tensor(sorted(found[0] + found[1]))
        shares = [torch.searchsorted(torch.tensor(sorted(one)), both, right=True) / len(one) for one in found]
        if float((shares[0] - shares[1]).abs().max()) <= limit:
            return n
    return None
