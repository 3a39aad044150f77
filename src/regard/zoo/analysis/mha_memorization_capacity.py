"""How many examples one attention layer memorises: H (r - 1) + 1, r = min(n, d_h) (id 271; Mahdavi, Liao and Thrampoulidis, 2023).

logits (W_Q e)^T W_K E^T / sqrt(d), weights a_h over the n context tokens, out = sum_h w_h . (E^T a_h):  linear in w, so fitted in closed form.
A shared context: features of T queries have rank H (n - 1) + 1, since each head's weights sum to one; contexts of their own: min(T, H d).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.parts import takes
from regard.results import Column, Result
from regard.tasks.training import fit

KINDS = ("random", "shared", "permuted")


def examples(
    count: int, n: int, dim: int = 64, contexts: str = "random", *, bag: int = 500, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(queries (T, d), contexts (T, n, d)) uniform in [0, 1]: contexts drawn for each, one "shared" by all, or "permuted": n of one bag of tokens
    in a random order for each."""
    if contexts not in KINDS or n < 1 or (contexts == "permuted" and n > bag):
        raise RegardError(f"contexts={contexts!r}, n={n}, bag={bag}; expected one of {', '.join(KINDS)}, and 1 <= n <= bag")
    generator = torch.Generator().manual_seed(seed)
    queries = torch.rand(count, dim, generator=generator, dtype=dtype)
    if contexts == "random":
        return queries, torch.rand(count, n, dim, generator=generator, dtype=dtype)
    if contexts == "shared":
        return queries, torch.rand(1, n, dim, generator=generator, dtype=dtype).expand(count, -1, -1)
    tokens = torch.rand(bag, dim, generator=generator, dtype=dtype)
    return queries, tokens[torch.rand(count, bag, generator=generator).argsort(-1)[:, :n]]


def kruskal_rank(rows: Tensor, at_most: int | None = None, tries: int = 200, seed: int = 0) -> int:
    """The greatest r such that every r rows (of `tries` random sets, and runs side by side) are independent: the theorem asks r >= n of the
    stacked contexts and r >= min(n, d_h) of the queries."""
    limit, generator, best = min(at_most or min(rows.shape), *rows.shape), torch.Generator().manual_seed(seed), 0
    for r in range(1, limit + 1):
        sets = [torch.randperm(len(rows), generator=generator)[:r] for _ in range(tries)]
        sets += [torch.arange(at, at + r) for at in range(0, len(rows) - r + 1, max(1, r))]
        if int(torch.linalg.matrix_rank(torch.stack([rows[chosen] for chosen in sets])).min()) < r:
            return best
        best = r
    return best


@register("mha-memorization-capacity", kind="module")
class MemoryAttention(nn.Module):
    """One layer, queries (B, d) and contexts (B, n, d) -> (B, outputs); no feed-forward part, no bias, no residual, the query not a key.

    key_dim: d_h (None: d); value_dim: d_v, 1 as in the experiments; model_dim: of W_O, and then a readout to `outputs` (None: W_O gives the
    outputs). weights: "softmax" or "sigmoid". scale: of scores (None: d^-1/2 as in the theorem)."""

    def __init__(
        self,
        dim: int = 64,
        heads: int = 20,
        *,
        key_dim: int | None = None,
        value_dim: int = 1,
        model_dim: int | None = None,
        outputs: int = 1,
        weights: str = "softmax",
        scale: float | None = None,
    ):
        super().__init__()
        if weights not in ("softmax", "sigmoid"):
            raise RegardError(f"weights={weights!r}; expected softmax or sigmoid")
        key_dim = key_dim or dim
        self.q, self.k = (nn.Parameter(torch.randn(heads, key_dim, dim) / dim**0.5) for _ in range(2))
        self.v = nn.Parameter(torch.randn(heads, value_dim, dim) / dim**0.5)
        self.out = nn.Linear(heads * value_dim, model_dim or outputs, bias=False)
        self.readout = nn.Linear(model_dim, outputs) if model_dim else nn.Identity()
        self.dim = dim
        self.kind, self.scale = weights, dim**-0.5 if scale is None else scale

    @takes(queries="batch dim", contexts="batch n dim")
    def attention(self, queries: Tensor, contexts: Tensor) -> Tensor:
        """Weights (B, H, n)."""
        q, k = torch.einsum("hed,bd->bhe", self.q, queries), torch.einsum("hed,bnd->bhne", self.k, contexts)
        scores = torch.einsum("bhe,bhne->bhn", q, k) * self.scale
        return scores.softmax(-1) if self.kind == "softmax" else scores.sigmoid()

    @takes(queries="batch dim", contexts="batch n dim")
    def features(self, queries: Tensor, contexts: Tensor) -> Tensor:
        """Z (B, H d): what each head's weights make of the context, which values and outputs only combine."""
        return torch.einsum("bhn,bnd->bhd", self.attention(queries, contexts), contexts).flatten(1)

    @takes(queries="batch dim", contexts="batch n dim")
    def forward(self, queries: Tensor, contexts: Tensor) -> Tensor:
        read = torch.einsum("bhd,hed->bhe", self.features(queries, contexts).unflatten(1, (len(self.v), -1)), self.v)
        return self.readout(self.out(read.flatten(1)))  # type: ignore[no-any-return]

    @torch.no_grad()
    def solve(self, queries: Tensor, contexts: Tensor, y: Tensor) -> float:
        """The best values for labels y (B,), queries and keys as they are, by least squares; for one output and value_dim=1. The largest
        residual left."""
        if self.v.shape[1] != 1 or self.out.out_features != 1 or not isinstance(self.readout, nn.Identity):
            raise RegardError("solve() is for one output, value_dim=1 and model_dim=None; expected such a layer, or `memorise`")
        z = self.features(queries, contexts)
        self.v.copy_((torch.linalg.pinv(z) @ y).view_as(self.v))
        self.out.weight.fill_(1.0)
        return float((self(queries, contexts)[:, 0] - y).abs().max())


def bound(heads: int, n: int, key_dim: int) -> int:
    """H (min(n, d_h) - 1) + 1 examples that the theorem says are memorised."""
    return heads * (min(n, key_dim) - 1) + 1


@torch.no_grad()
def saturation(model: MemoryAttention, queries: Tensor, contexts: Tensor, level: float = 0.99) -> Tensor:
    """(H,): the share of examples on which a head gives one token more than `level`."""
    return (model.attention(queries, contexts).amax(-1) > level).double().mean(0)


@dataclass(frozen=True)
class Memorised(Result):
    """count: of the examples that are right (labels) or within `close` (numbers); saturated (H,): see `saturation`."""

    count: int
    of: int
    loss: tuple[float, ...]
    saturated: Tensor

    def columns(self) -> dict[str, Column]:
        return {"step": range(len(self.loss)), "loss": self.loss}


def memorise(
    queries: Tensor,
    contexts: Tensor,
    labels: Tensor,
    *,
    heads: int = 20,
    key_dim: int | None = None,
    classes: int | None = 100,
    steps: int = 2000,
    batch: int = 256,
    lr: float = 1e-3,
    close: float = 0.05,
    seed: int = 0,
    **options: Any,
) -> Memorised:
    """Train all of a layer on T examples with Adam: labels (T,) of `classes` classes, or numbers (classes=None)."""
    torch.manual_seed(seed)
    model = MemoryAttention(queries.shape[1], heads, key_dim=key_dim, model_dim=queries.shape[1], outputs=classes or 1, **options).to(
        queries.dtype
    )

    def draw(generator: torch.Generator) -> Tensor:
        return torch.randint(len(labels), (min(batch, len(labels)),), generator=generator)

    def loss(rows: Tensor) -> Tensor:
        out = model(queries[rows], contexts[rows])
        return F.cross_entropy(out, labels[rows]) if classes else (out[:, 0] - labels[rows]).square().mean()

    losses = fit(model, draw, loss, steps, lr=lr, seed=seed)
    with torch.no_grad():
        out = model(queries, contexts)
        right = out.argmax(-1) == labels if classes else (out[:, 0] - labels).abs() < close
    return Memorised(int(right.sum()), len(labels), tuple(losses), saturation(model, queries, contexts))


def capacity(sizes: Sequence[int], n: int, dim: int, heads: int, contexts: str = "shared", tol: float = 1e-6, seed: int = 0) -> int:
    """The most examples of `sizes` whose random labels the closed form fits to `tol`, in float64."""
    best = 0
    for count in sorted(sizes):
        model = MemoryAttention(dim, heads).double()
        queries, kept = examples(count, n, dim, contexts, seed=seed, dtype=torch.float64)
        y = torch.rand(count, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
        best = count if model.solve(queries, kept, y) < tol else best
    return best
