"""S2-Attention: each head reads its own share of the distant blocks, so that heads together read all (id 195; Lin et al., 2024).

block i of key head g sees block j where j <= i and (i - j < local or (j + g step + offset) mod stride = 0);   the last heads may be dense
A block is seen for good or dropped for good once it leaves the window, so a cache of local b + L / stride tokens a head is exact.
Heads together read every block where key heads >= stride and step = 1, not where key heads * step >= stride alone.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from regard.algebra import Causal, Chosen, Input, Selection, Weighted, bind
from regard.algebra.select import View as Sight
from regard.cache.policy import Policy, begin
from regard.cache.view import View, read
from regard.catalog.registry import register
from regard.engine.door import attend, attend_with_stats
from regard.errors import RegardError


def s2_block_mask(
    n_heads: int,
    length: int,
    block: int = 64,
    local_blocks: int = 4,
    stride: int = 4,
    n_dense_heads: int = 0,
    n_kv_heads: int | None = None,
    *,
    offset: int = 0,
    step: int | None = None,
    homo_head: bool = False,
    relative: bool = False,
    causal: bool = True,
) -> Tensor:
    """(key heads, blocks, blocks) bool: which key blocks each query block reads, for all query heads of a key head alike.

    n_heads: query heads. step: by how much the shares of neighbouring key heads are moved; None is the release's max(1, stride // n_heads), with
    which heads together miss blocks where there are fewer key heads than `stride` or where stride and step share a factor. offset: moves all shares. homo_head: one share for all,
    (1, ...). relative: shares count from the query's block, which frees nothing of a cache. causal=False: both sides.
    """
    kv_heads = n_heads if n_kv_heads is None else n_kv_heads
    if min(n_heads, length, block, stride, kv_heads) < 1 or n_heads % kv_heads or (local_blocks < 1 and stride > 1) or local_blocks < 0:
        raise RegardError(
            f"n_heads={n_heads}, n_kv_heads={kv_heads}, length={length}, block={block}, local_blocks={local_blocks}, stride={stride}: expected "
            "positive numbers, and query heads a multiple of key heads"
        )
    if not 0 <= n_dense_heads <= kv_heads or (homo_head and n_dense_heads):
        raise RegardError(
            f"n_dense_heads={n_dense_heads}, homo_head={homo_head}: expected 0 to {kv_heads} key heads, none if all are alike"
        )
    step = max(1, stride // n_heads) if step is None else step
    blocks = torch.arange(-(-length // block))
    g = torch.arange(1 if homo_head else kv_heads)[:, None, None]
    i, j = blocks[:, None], blocks
    apart = i - j if causal else (i - j).abs()
    far = (((i - j) if relative else j) + g * step + offset) % stride == 0
    seen = (apart < local_blocks) | far | (g >= kv_heads - n_dense_heads)
    return (seen & (j <= i)) if causal else seen.expand(len(g), len(blocks), len(blocks))


def csr(layout: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a layout (heads, n, m): where each starts, (heads, n + 1), and its columns, (heads, most), -1 behind the last. int32.
    Of `layout.mT`: columns and their rows."""
    starts = torch.nn.functional.pad(layout.sum(-1).cumsum(-1), (1, 0))
    columns = torch.full((len(layout), int(starts[:, -1].max())), -1)
    for head, own in enumerate(layout):
        found = own.nonzero()[:, 1]
        columns[head, : len(found)] = found
    return starts.int(), columns.int()


def kv_efficient(layout: Tensor) -> bool:
    """Whether no head reads a block that lies wholly behind it after it has left one out: then dropped blocks are never missed."""
    rows, columns = torch.arange(1, layout.shape[1])[:, None], torch.arange(layout.shape[2])
    behind = (rows > columns).to(layout.device)
    return not bool((layout[:, 1:] & ~layout[:, :-1] & behind).any())


def laid_out(q: Tensor, k: Tensor, view: Sight, layout: Tensor, *, block: int) -> Selection:
    """The rows of a layout for the call's queries, block by block where they begin with one."""
    count = -(-k.shape[-2] // block)
    layout = layout[..., :count].repeat_interleave(q.shape[1] // layout.shape[0] if layout.shape[0] > 1 else 1, 0)
    if view.first % block == 0:
        start = view.first // block
        return Selection(layout[None, :, start : start + -(-q.shape[-2] // block)], block, block)
    rows = (torch.arange(q.shape[-2], device=q.device) + view.first) // block
    return Selection(layout[None, :, rows], 1, block)


@register("s2-attention", kind="function")
def s2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Tensor,
    block: int = 64,
    *,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q (B, H, Lq, D), k, v (B, Hkv, L, D) -> (B, H, Lq, Dv), softmax over the blocks of `layout` (1, Hkv or H, blocks, blocks) bool; with
    return_lse also log-sum-exps (B, H, Lq), by which parts of a cache merge. Queries are the last tokens. causal: also inside blocks."""
    if (
        k.dim() != 4
        or q.dim() != 4
        or layout.dim() != 3
        or layout.dtype != torch.bool
        or layout.shape[0] not in (1, k.shape[1], q.shape[1])
    ):
        raise RegardError(
            f"layout {tuple(layout.shape)} of {layout.dtype} for q {tuple(q.shape)}, k {tuple(k.shape)}: expected bool, (heads, blocks, blocks) "
            "with 1, Hkv or H heads"
        )
    if block < 1 or min(layout.shape[1:]) * block < k.shape[2]:
        raise RegardError(f"layout {tuple(layout.shape)} of blocks of {block} for {k.shape[2]} keys: expected as many blocks or more")
    if not causal and q.shape[2] != k.shape[2]:
        raise RegardError(f"causal=False with {q.shape[2]} queries and {k.shape[2]} keys: expected as many")
    own = Weighted(select=Chosen(bind(laid_out, block=block)), inputs=(Input("layout", "fff", dtype="bool"),))
    mask = Causal() if causal else None
    if not return_lse:
        return attend(q, k, v, own, mask=mask, scale=scale, layout=layout.to(q.device))
    out, stats = attend_with_stats(q, k, v, own, mask=mask, scale=scale, layout=layout.to(q.device))
    return out, (stats.shift + stats.total.log())[..., 0]


class S2Cache(Policy):
    """A layout at work in a transformers decoder: `with S2Cache(layout, block)(model): model.generate(...)`; entries that no later token of
    their head can see are gone. layout (1 or Hkv, blocks, blocks), causal; blocks count from a row's first token behind its padding."""

    def __init__(self, layout: Tensor, block: int = 64):
        super().__init__(1.0, decode=True)
        if layout.dim() != 3 or layout.dtype != torch.bool or block < 1 or layout.shape[1] != layout.shape[2] or bool(layout.triu(1).any()):
            raise RegardError(
                f"layout {tuple(layout.shape)} of {layout.dtype}, block={block}: expected bool, (heads, blocks, blocks), causal"
            )
        if not kv_efficient(layout):
            warnings.warn("heads of this layout come back to blocks that they have left out; these stay in the cache", stacklevel=2)
        self.layout, self.block = layout, block
        self.needed = layout.flip(1).long().cummax(1).values.flip(1).bool()  # by some later row

    def begin(self, layers: int, heads: int) -> None:
        if self.layout.shape[0] not in (1, heads):
            raise RegardError(f"layout of {self.layout.shape[0]} heads: expected 1 or the model's {heads} key heads")

    def shown(self, table: Tensor, view: View, places: Tensor) -> Tensor:
        """(B, h, n, m): what a table (heads, blocks, blocks) says of tokens at places (n,) and of the remembered ones."""
        first = begin(view)[:, None, None]
        rows, columns = ((at - first).clamp_min(0) // self.block for at in (places, view.part.places))
        if int(rows.max()) >= table.shape[1]:
            raise RegardError(
                f"{int(rows.max()) + 1} blocks of {self.block} tokens for a layout of {table.shape[1]}: expected a larger one"
            )
        heads = view.part.heads if len(table) > 1 else torch.zeros_like(view.part.heads)
        return table.to(places.device)[heads[:, None, None], rows[..., None], columns[:, :, None]]

    def compute(self, view: View, places: Tensor) -> Tensor:
        if view.first and view.window is None and bool(view.part.alive.all()):
            out = s2_attention(view.query.flatten(1, 2), view.part.keys, view.part.values, self.layout, self.block, scale=view.scale)
            assert isinstance(out, Tensor)
            return out.unflatten(1, view.query.shape[1:3])
        return read(view.query, view.part, places, view.scale, view.window, self.shown(self.layout, view, places))

    def scores(self, view: View) -> Tensor:
        return torch.where(self.kept(view), torch.inf, -torch.inf)

    def counts(self, view: View, scores: Tensor) -> Tensor:
        return (self.kept(view) & view.part.alive).sum(-1)

    def kept(self, view: View) -> Tensor:
        """(B, h, m) bool: what the next token or a later one can see."""
        after = (view.part.places.max() + 1)[None]
        last = begin(view).max() + len(self.layout[0]) * self.block - 1  # behind the layout's end nothing can come
        return self.shown(self.needed, view, after.minimum(last))[:, :, 0]


__all__ = ["S2Cache", "csr", "kv_efficient", "s2_attention", "s2_block_mask"]
