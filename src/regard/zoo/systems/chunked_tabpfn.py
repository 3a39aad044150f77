"""Chunked TabPFN: exact attention over very many rows, or very many short sequences, in bounded memory (id 279; Sergazinov et al., 2025).

o_i = softmax(s q_i K^T) V for queries q_chunk at a time; keys k_chunk at a time: (m, l, a) <- (m', l e^(m - m') + sum e^(S - m'), ...)
batches batch_chunk at a time.   TabPFN layer: x <- LN(x + A_features(x)); x <- LN(x + A_rows(x)); x <- LN(x + MLP(x)); test rows read
training rows alone
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.adapt.intercept import Intercepted
from regard.algebra import Weighted
from regard.catalog.registry import register
from regard.engine.door import attend, attend_with_stats
from regard.engine.merge import merge
from regard.errors import RegardError
from regard.nn.two_axis import TwoAxisLayer


@register("chunked-tabpfn", kind="function")
def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_chunk: int = 5000,
    k_chunk: int | None = None,
    batch_chunk: int = 20000,
    scale: float | None = None,
) -> Tensor:
    """q (B, H, Lq, D), k, v (B, Hkv, Lk, D) -> (B, H, Lq, Dv), each query over all keys; scale: None is D^-1/2.

    k_chunk: keys at a time (None: all), so that what is held beside the output is q_chunk * k_chunk * H numbers a row of the batch.
    batch_chunk: rows of the batch at a time, for attention among a table's features.
    """
    for name, value in (("q_chunk", q_chunk), ("k_chunk", k_chunk or 1), ("batch_chunk", batch_chunk)):
        if not isinstance(value, int) or value < 1:
            raise RegardError(f"{name}={value!r}: expected a positive integer")
    if q.shape[0] > batch_chunk:
        rows = zip(*(x.split(batch_chunk) for x in (q, k, v)), strict=True)
        return torch.cat([chunked_attention(*row, q_chunk, k_chunk, batch_chunk, scale) for row in rows])
    if q.shape[2] > q_chunk:
        return torch.cat([chunked_attention(part, k, v, q_chunk, k_chunk, batch_chunk, scale) for part in q.split(q_chunk, 2)], 2)
    if k_chunk is None or k.shape[2] <= k_chunk:
        return attend(q, k, v, scale=scale)
    pairs = zip(k.split(k_chunk, 2), v.split(k_chunk, 2), strict=True)
    held = None
    for some, of in pairs:  # two at a time: what is held does not grow with the number of chunks
        part = attend_with_stats(q, some, of, scale=scale)
        held = part if held is None else merge(Weighted(), (held, part))
    assert held is not None
    return held[0]


def chunking(q_chunk: int = 5000, k_chunk: int | None = None, batch_chunk: int = 20000) -> Intercepted:
    """`with chunking(): model(x)`: PyTorch's scaled_dot_product_attention, called by whichever module, runs in chunks. Masked, causal and dropping
    calls are refused."""

    def instead(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, *args: Any, **options: Any
    ) -> Tensor:
        scale = options.pop("scale", None)
        if (
            attn_mask is not None
            or dropout_p
            or any(args)
            or any(x for name, x in options.items() if name != "enable_gqa")
            or query.dim() != 4
        ):
            raise RegardError(
                "chunking runs plain attention of (B, H, L, D) without masks, causality or dropout; expected such calls alone"
            )
        return chunked_attention(query, key, value, q_chunk, k_chunk, batch_chunk, scale)

    return Intercepted(instead)


class TabPFNLite(nn.Module):
    """A table's test rows classified in context, after pre-training on drawn tables: `fit(x, y)`, `predict(x)`, `predict_proba(x)`.

    classes: most classes of a table. group: features a token, the last filled up with zeros. multiquery_test: test rows read the first head's keys and
    values in all heads. Features are told apart by drawn directions (seed). x is standardised by its training rows. Defaults are small ones;
    TabPFN v2 has dim 192, 6 heads, 12 layers, hidden 768, groups of 2 and multiquery_test.
    """

    place: Tensor

    def __init__(
        self,
        classes: int = 2,
        dim: int = 32,
        heads: int = 4,
        layers: int = 3,
        hidden: int | None = None,
        group: int = 1,
        eps: float = 1e-5,
        multiquery_test: bool = False,
        most_features: int = 100,
        seed: int = 0,
    ):
        super().__init__()
        if min(classes - 1, dim, heads, layers, group, most_features) < 1 or dim % heads or dim % 4:
            raise RegardError(
                f"classes={classes}, dim={dim}, heads={heads}, layers={layers}, group={group}, most_features={most_features}: expected at least 2 "
                "classes, positive numbers, and dim a multiple of heads and of 4"
            )
        self.classes, self.group = classes, group
        self.x_in, self.y_in, self.place_in = nn.Linear(group, dim), nn.Linear(classes + 1, dim), nn.Linear(dim // 4, dim)
        draws = torch.randn(-(-most_features // group), dim // 4, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("place", draws)
        hidden = 2 * dim if hidden is None else hidden
        self.layers = nn.ModuleList(TwoAxisLayer(dim, heads, hidden, eps, multiquery_test) for _ in range(layers))
        self.head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, classes))
        self.kept: tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor] | None = None

    def chunked(self, **chunks: Any) -> TabPFNLite:
        """Itself, with attention by `chunked_attention` of these options; none: at once."""
        for layer in self.layers:
            for part in (layer.features, layer.rows):
                part.attention = functools.partial(chunked_attention, **chunks) if chunks else attend  # type: ignore[union-attr]
        return self

    def tokens(self, x: Tensor, y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """x (B, N, features), y (B, n) of the first rows -> (B, N, groups + 1, dim); the target's token is the last one."""
        x = F.pad((x - mean) / std, (0, -x.shape[-1] % self.group)).unflatten(-1, (-1, self.group))
        if x.shape[2] > len(self.place):
            raise RegardError(f"{x.shape[2]} groups of features; expected at most {len(self.place)}: a model of more most_features")
        known = F.one_hot(y, self.classes + 1).to(x)  # class `classes`: unknown
        unknown = torch.full((len(x), x.shape[1] - y.shape[1]), self.classes, device=x.device)
        known = torch.cat((known, F.one_hot(unknown, self.classes + 1).to(x)), 1)
        return torch.cat((self.x_in(x) + self.place_in(self.place[: x.shape[2]]), self.y_in(known)[:, :, None]), 2)

    @staticmethod
    def scales(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(1, keepdim=True), x.std(1, keepdim=True, unbiased=False).clamp_min(1e-6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, N, features), y (B, n) classes of the first n rows -> logits (B, N - n, classes) of the others."""
        self.check(x, y)
        h = self.tokens(x, y, *self.scales(x[:, : y.shape[1]]))
        for layer in self.layers:
            h, _ = layer(h, y.shape[1], None)
        return self.head(h[:, y.shape[1] :, -1])  # type: ignore[no-any-return]

    def check(self, x: Tensor, y: Tensor) -> None:
        """Raise where a table does not fit the model."""
        if x.dim() != 3 or y.dim() != 2 or not 0 < y.shape[1] <= x.shape[1] or x.shape[2] < 1:
            raise RegardError(f"x {tuple(x.shape)}, y {tuple(y.shape)}: expected (B, N, features), and (B, n) classes with 0 < n <= N")
        if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < self.classes:
            raise RegardError(f"y holds {int(y.min())} to {int(y.max())}: expected classes 0 to {self.classes - 1}")
        if not bool(x.isfinite().all()):
            raise RegardError("x holds NaN or inf; expected finite numbers: fill missing ones first")

    @torch.no_grad()
    def fit(self, x: Tensor, y: Tensor) -> TabPFNLite:
        """Take up a table x (n, features), y (n,): each layer's keys and values of its rows are kept. No weight changes."""
        self.check(x[None], y[None])
        mean, std = self.scales(x[None])
        h, kept = self.tokens(x[None], y[None], mean, std), []
        for layer in self.layers:
            h, own = layer(h, len(x), None)
            kept.append(own)
        self.kept = kept, mean, std
        return self

    @torch.no_grad()
    def predict_proba(self, x: Tensor) -> Tensor:
        """x (m, features) -> (m, classes), each row from the fitted table alone."""
        if self.kept is None:
            raise RegardError("predict before fit; expected model.fit(x, y) with the table to read")
        kept, mean, std = self.kept
        if x.dim() != 2 or x.shape[1] != mean.shape[-1]:
            raise RegardError(f"x {tuple(x.shape)}: expected (rows, {mean.shape[-1]}) as fitted")
        h = self.tokens(x[None], torch.zeros(1, 0, dtype=torch.long, device=x.device), mean, std)
        for layer, own in zip(self.layers, kept, strict=True):
            h, _ = layer(h, 0, own)
        return self.head(h[0, :, -1]).softmax(-1)  # type: ignore[no-any-return]

    def predict(self, x: Tensor) -> Tensor:
        """The likeliest class of each row, (m,)."""
        return self.predict_proba(x).argmax(-1)


__all__ = ["TabPFNLite", "chunked_attention", "chunking"]
