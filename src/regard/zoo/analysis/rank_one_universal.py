"""One layer, one head, weights of rank one: a contextual id for every token and context (id 56; Kajitsuka and Sato, 2023).

boltz(a) = a^T softmax(a).   Vectors without repeated entries, entries equal or separated by delta > 4 ln n + 3, |a_k| <= r: different sets differ in
boltz by at least (ln n)^2 e^{-2r}.   F(X) = X + W_O (W_V X) softmax((W_K X)^T (W_Q X)), W_K = u v^T, W_Q = u' v^T, u.u' the scale:
each token moves along one direction by the Boltzmann mean of v^T X at its own temperature: an id of (token, set of tokens).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.parts import takes
from regard.results import Result
from regard.tasks.training import fit


def boltz(a: Tensor) -> Tensor:
    """a^T softmax(a) over the last axis."""
    return (a * a.softmax(-1)).sum(-1)


def separation_bound(n: int, r: float) -> float:
    """(ln n)^2 e^{-2r}: by which boltz tells sets of n numbers within r apart, if they are separated by more than 4 ln n + 3."""
    return math.log(n) ** 2 * math.exp(-2 * r)


@register("rank-one-universal", kind="module")
class RankOneAttention(nn.Module):
    """X (B, d, n), tokens in columns -> (B, d, n): X + W_O (W_V X) softmax((W_K X)^T (W_Q X)), softmax over keys, each matrix an outer product of
    two learned vectors.

    direction (d,), v: at the start all matrices are v v^T (None: drawn), W_Q times `scale`; out (d,): W_O is out v^T (None: v). hard: the
    hardmax twin, whose keys of the greatest score share the weight."""

    def __init__(
        self, dim: int, direction: Tensor | None = None, scale: float = 1.0, out: Tensor | None = None, hard: bool = False, seed: int = 0
    ):
        super().__init__()
        if direction is None:
            direction = F.normalize(torch.randn(dim, generator=torch.Generator().manual_seed(seed)), dim=0)
        if direction.shape != (dim,) or (out is not None and out.shape != (dim,)):
            raise RegardError(f"direction {tuple(direction.shape)}, out {None if out is None else tuple(out.shape)}: expected ({dim},)")
        self.dim, self.hard = dim, hard
        left = {"k": direction, "q": scale * direction, "v": direction, "o": direction if out is None else out}
        self.left = nn.ParameterDict({name: nn.Parameter(x.clone()) for name, x in left.items()})
        self.right = nn.ParameterDict({name: nn.Parameter(direction.clone()) for name in left})

    def matrix(self, name: str) -> Tensor:
        """W_K, W_Q, W_V or W_O by "k", "q", "v" or "o": (d, d)."""
        return torch.outer(self.left[name], self.right[name])

    @takes(x="batch dim n")
    def forward(self, x: Tensor) -> Tensor:
        k, q, v, o = (self.matrix(name) for name in "kqvo")
        scores = (k @ x).transpose(1, 2) @ (q @ x)
        if self.hard:
            best = scores >= scores.amax(1, keepdim=True) - 1e-9 * scores.abs().amax(1, keepdim=True)
            weights = best.to(x) / best.sum(1, keepdim=True)
        else:
            weights = scores.softmax(1)
        return x + o @ ((v @ x) @ weights)


def telling(vocabulary: Tensor, tries: int = 100, seed: int = 0) -> Tensor:
    """A unit vector v (d,) for tokens (V, d) whose |v.(x - x')| is at least 1/V^2 sqrt(8 / (pi d)) |x - x'| for all pairs, drawn until it is."""
    count, dim = vocabulary.shape
    gaps = vocabulary[:, None] - vocabulary
    lengths = gaps.norm(dim=-1) + torch.eye(count, dtype=vocabulary.dtype)
    if bool((lengths == 0).any()):
        raise RegardError("vocabulary holds one token twice; expected different ones")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(tries):
        v = F.normalize(torch.randn(dim, generator=generator, dtype=vocabulary.dtype), dim=0)
        share = (gaps @ v).abs() / lengths + torch.eye(count, dtype=vocabulary.dtype)
        if float(share.min()) >= math.sqrt(8 / (math.pi * dim)) / count**2:
            return v
    raise RegardError(f"no direction in {tries} draws tells the vocabulary apart; expected fewer tokens, or other seeds")


def contextual_mapping(vocabulary: Tensor, scale: float = 1.0, hard: bool = False, seed: int = 0) -> RankOneAttention:
    """The layer for a vocabulary (V, d): outputs at two tokens agree iff the tokens and their sequences' sets of tokens do. Sequences without
    repeated tokens."""
    v = telling(vocabulary, seed=seed)
    return RankOneAttention(vocabulary.shape[1], v, scale, hard=hard).to(vocabulary.dtype)


@torch.no_grad()
def collisions(layer: RankOneAttention, vocabulary: Tensor, ids: Tensor, tol: float = 1e-9) -> tuple[int, float, float]:
    """ids (N, n) without repeats in a row -> (pairs of different (token, context) whose outputs agree within tol, the least distance of
    different pairs, the greatest of equal ones)."""
    out = layer(vocabulary[ids].transpose(1, 2)).transpose(1, 2).flatten(0, 1)
    context = ids.sort(-1).values.repeat_interleave(ids.shape[1], 0)
    same = (context[:, None] == context).all(-1) & (ids.flatten()[:, None] == ids.flatten())
    apart = torch.cdist(out, out, compute_mode="donot_use_mm_for_euclid_dist")
    upper = torch.ones_like(same).triu(1)
    different = apart[upper & ~same]
    equal = apart[upper & same]
    return int((different < tol).sum()), float(different.min()), float(equal.max()) if len(equal) else 0.0


class OneLayer(nn.Module):
    """Feed-forward, one rank-one attention, feed-forward, each on every column: (B, d_in, n) -> (B, d_out, n). attention=False leaves it out."""

    def __init__(self, dim_in: int, dim: int, dim_out: int, width: int, attention: bool = True, hard: bool = False):
        super().__init__()
        self.first, self.last = (
            nn.Sequential(nn.Linear(a, width), nn.ReLU(), nn.Linear(width, b)) for a, b in ((dim_in, dim), (dim, dim_out))
        )
        self.attention = RankOneAttention(dim, hard=hard) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.first(x.transpose(1, 2)).transpose(1, 2))
        return self.last(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Fitted(Result):
    """right: share of labels that are right (None for numbers); error: mean squared over the variance (None for labels)."""

    right: float | None
    error: float | None
    loss: tuple[float, ...]


def fit_sequences(model: OneLayer, x: Tensor, y: Tensor, *, steps: int = 1500, lr: float = 3e-3, seed: int = 0) -> Fitted:
    """Train on sequences x (N, d_in, n) until they are known: labels y (N, n) of whole numbers, or numbers y (N, d_out, n)."""
    labels = not y.is_floating_point()

    def loss(_: object) -> Tensor:
        out = model(x)
        return F.cross_entropy(out, y) if labels else (out - y).square().mean()

    losses = fit(model, lambda g: None, loss, steps, lr=lr, seed=seed)
    with torch.no_grad():
        out = model(x)
    right = float((out.argmax(1) == y).double().mean()) if labels else None
    error = None if labels else float((out - y).square().mean() / y.var(correction=0))
    return Fitted(right, error, tuple(losses))
