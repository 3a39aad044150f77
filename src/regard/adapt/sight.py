"""What a model lets its queries see: causality, padding, packed documents, windows and biases, read out of the mask it makes.

A mechanism that looks at places must stand on the places of the real tokens, not on those of a padded batch or of the slots of a cache. So
the mask is told apart into pieces, a document of a row each (those of one size together), in which queries stand at the end of the
keys: what `attend` takes, and what the row alone would have given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algebra import Causal, Mask, Window
from ..algebra.token_mask import Explicit
from ..errors import RegardError

HIDDEN = -1e4  # models hide with -inf, with the least number of a dtype, or with -10000


@dataclass(frozen=True)
class Sight:
    """shown (B or 1, H or 1, Lq, Lk) bool, or None: everything that causality leaves. bias: added to scores, as shown in shape, or None.

    causal: whether no query sees a key after its own. first: the place of the first query among the keys; None: it cannot be told.
    crossed: queries and keys are of two sequences.
    """

    q_len: int
    k_len: int
    shown: Tensor | None
    bias: Tensor | None
    causal: bool
    first: int | None
    crossed: bool = False

    @property
    def plain(self) -> bool:
        """Whether all there is to know is causality: whole prompts, or a token at the end of the keys."""
        return self.shown is None and self.bias is None

    @property
    def mask(self) -> Mask | None:
        """The mask where nothing is hidden beyond causality."""
        return Causal() if self.causal else None


def look(mask: Any, q_len: int, k_len: int, causal: bool, own: str, window: int | None, places: bool) -> Sight:
    """The sight of a call with a model's mask. causal: whether the module says so. own: the attention that the model made the mask for.
    window: of the module, for masks that leave it out. places: whether it must be known where the queries stand."""
    if mask is None:
        if "flash" in own:
            return windowed(q_len, k_len, causal, window, None)
        # SDPA's causal flag counts queries from the first key, whatever the length of the keys; plain attention knows no flag at all.
        flagged = causal and q_len > 1 and own != "eager"
        length = q_len if flagged else k_len
        return Sight(
            q_len, length, None, None, flagged or (causal and q_len == 1), 0 if flagged else k_len - q_len, not causal and q_len != k_len
        )
    if not isinstance(mask, Tensor):
        raise RegardError(
            f"the model gives its attention a {type(mask).__name__}; expected model.set_attn_implementation('sdpa') or 'eager'"
        )
    if mask.dim() == 2:
        return windowed(q_len, k_len, causal, window, mask.bool())
    if mask.dim() != 4:
        raise RegardError(f"the model's mask has shape {tuple(mask.shape)}; expected (B, H, Lq, Lk)")
    if 1 < mask.shape[-1] < k_len or mask.shape[-2] not in (1, q_len):
        raise RegardError(f"the model's mask has shape {tuple(mask.shape)} for {q_len} queries and {k_len} keys; expected (B, H, Lq, Lk)")
    shown, bias = told_apart(mask[..., :k_len])
    shown = shown.expand(-1, -1, q_len, k_len)
    if not places:
        return Sight(q_len, k_len, None if bool(shown.all()) else shown, bias, False, None)
    return placed(shown, bias, q_len, k_len, causal)


def windowed(q_len: int, k_len: int, causal: bool, window: int | None, keep: Tensor | None) -> Sight:
    """Flash attention's reading: queries at the end of the keys, keep (B, Lk), and the window in a number of its own."""
    at = torch.arange(k_len, device=None if keep is None else keep.device)
    back = at[k_len - q_len :, None] - at
    shown = back >= 0 if causal else back == back
    if window is not None:
        shown = shown & (back.abs() < window)
    table = shown[None, None] if keep is None else shown[None, None] & keep[:, None, None, -k_len:]
    return placed(table, None, q_len, k_len, causal)


def told_apart(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """A model's mask as what it shows and what it adds."""
    if mask.dtype == torch.bool:
        return mask, None
    shown = mask > HIDDEN
    added = torch.where(shown, mask, 0)
    return shown, added if bool(added.any()) or mask.requires_grad else None


def placed(shown: Tensor, bias: Tensor | None, q_len: int, k_len: int, causal: bool) -> Sight:
    """Where the queries stand, and whether they see what comes after them."""
    crossed, first = not causal and q_len != k_len, k_len - q_len
    everything = bool(shown.all())
    if not causal:
        return Sight(q_len, k_len, None if everything else shown, bias, False, first, crossed)
    place: int | None = 0
    if q_len != k_len:
        at = torch.arange(k_len, device=shown.device)
        own = torch.where(shown, at, -1).amax(-1) - torch.arange(q_len, device=shown.device)
        found = own[shown.any(-1)]
        place = int(found.max()) if found.numel() and bool((found == found.max()).all()) else None
    if place is None:
        return Sight(q_len, k_len, shown, bias, bool(ahead(shown, first).any().logical_not()), None)
    if bool((shown & ahead(shown, place)).any()):
        return Sight(q_len, k_len, None if everything else shown, bias, False, place)
    length = place + q_len  # slots of a cache behind the last query are still empty
    shown, bias = shown[..., :length], None if bias is None or bias.shape[-1] == 1 else bias[..., :length]
    missing = ~shown & ~ahead(shown, place)
    return Sight(q_len, length, shown if bool(missing.any()) else None, bias, True, place)


def ahead(shown: Tensor, first: int) -> Tensor:
    """(Lq, Lk) bool: keys after the query's own."""
    return torch.arange(shown.shape[-1], device=shown.device) > first + torch.arange(shown.shape[-2], device=shown.device)[:, None]


@dataclass(frozen=True)
class Piece:
    """Some documents of one size: rows (n,), queries (n, a) and keys (n, m) of each; None: everything as it is. mask, and the tensor
    (n, 1 or H, a, m) it reads, if it reads one."""

    rows: Tensor | None
    queries: Tensor | None
    keys: Tensor | None
    mask: Mask | Tensor | None
    table: Tensor | None = None

    @property
    def reads(self) -> dict[str, Tensor]:
        return {} if self.table is None else {"visible": self.table}

    def take(self, x: Tensor, of: Tensor | None) -> Tensor:
        """x (B, H, L, D) of the piece's rows, at its queries or keys: (n, H, a or m, D)."""
        return x if self.rows is None or of is None else x[self.rows[:, None], :, of].transpose(1, 2)

    def heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.take(q, self.queries), self.take(k, self.keys), self.take(v, self.keys)

    def of_queries(self, x: Tensor, batch: int, q_len: int) -> Tensor:
        """x (B or 1, H, Lq or 1, 1) at the piece's queries: (n or 1, H, a or 1, 1)."""
        if self.rows is None or x.shape[0] == x.shape[2] == 1:
            return x
        return self.take(x.expand(batch, -1, q_len, -1), self.queries)

    def pairs(self, x: Tensor, batch: int, q_len: int, k_len: int) -> Tensor:
        """x (B or 1, H or 1, Lq or 1, Lk or 1) at the piece's pairs: (n, H or 1, a, m)."""
        if self.rows is None or self.queries is None or self.keys is None:
            return x
        x = x.expand(batch, -1, q_len, k_len)
        return x[self.rows[:, None, None], :, self.queries[:, :, None], self.keys[:, None, :]].movedim(-1, 1)

    def put(self, into: Tensor, x: Tensor) -> Tensor:
        """x (n, H, a, D) put at its rows and queries of into (B, H, Lq, D)."""
        if self.rows is None or self.queries is None:
            return x
        return into.index_put((self.rows[:, None, None], torch.arange(x.shape[1], device=x.device)[:, None], self.queries[:, None, :]), x)

    def put_pairs(self, into: Tensor, x: Tensor) -> Tensor:
        """x (n, H, a, m) put at its pairs of into (B, H, Lq, Lk)."""
        if self.rows is None or self.queries is None or self.keys is None:
            return x
        heads = torch.arange(x.shape[1], device=x.device)[:, None, None]
        at = (self.rows[:, None, None, None], heads, self.queries[:, None, :, None], self.keys[:, None, None, :])
        return into.index_put(at, x)


def pieces(sight: Sight, batch: int) -> Iterator[Piece]:
    """The sight as pieces in which places are those of real tokens."""
    if sight.shown is None:
        yield Piece(None, None, None, sight.mask)
        return
    if sight.first is None:
        raise RegardError(
            "the model's mask does not say where its queries stand among the keys; expected padding on the left beside a cache"
        )
    shown = sight.shown.expand(batch, -1, sight.q_len, sight.k_len)
    if shown.shape[1] > 1 and bool((shown != shown[:, :1]).any()):
        raise RegardError(
            "the model's mask differs between heads; a mechanism that looks at places needs one order of tokens for all heads"
        )
    table = shown[:, 0]
    found: dict[tuple[int, int], list[tuple[int, Tensor, Tensor]]] = {}
    for row in range(batch):
        for queries, keys in documents(table[row], sight):
            found.setdefault((queries.numel(), keys.numel()), []).append((row, queries, keys))
    for parts in found.values():
        yield piece_of(sight, table, parts)


def documents(table: Tensor, sight: Sight) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries and keys of each document of a row whose queries see table (Lq, Lk): real tokens alone, those that somebody sees."""
    real = table.any(0)
    keys = real.nonzero().squeeze(-1)
    if not keys.numel():
        return
    if sight.crossed:
        yield torch.arange(sight.q_len, device=table.device), keys
        return
    assert sight.first is not None
    own = real[sight.first : sight.first + sight.q_len]
    queries = own.nonzero().squeeze(-1)
    if not sight.causal or sight.q_len != sight.k_len:
        if queries.numel():
            yield queries, keys
        return
    # A document begins where a token sees nothing before it.
    inside = table[keys][:, keys]
    begins = inside.tril(-1).any(-1).logical_not()
    number = begins.cumsum(0)
    if bool((inside & (number[:, None] != number)).any()):
        yield keys, keys
        return
    for part in keys.tensor_split(begins.nonzero().squeeze(-1)[1:].cpu()):
        yield part, part


def piece_of(sight: Sight, table: Tensor, parts: list[tuple[int, Tensor, Tensor]]) -> Piece:
    rows = torch.tensor([row for row, _, _ in parts], device=table.device)
    queries, keys = torch.stack([part[1] for part in parts]), torch.stack([part[2] for part in parts])
    shown = table[rows[:, None, None], queries[:, :, None], keys[:, None, :]]
    order = torch.arange(keys.shape[1], device=table.device)
    back = order[keys.shape[1] - queries.shape[1] :, None] - order
    allowed = back >= 0 if sight.causal else back == back
    if bool((shown == allowed).all()):
        return Piece(rows, queries, keys, sight.mask)
    window = int(torch.where(shown, back, 0).max()) + 1
    if sight.causal and bool((shown == (allowed & (back < window))).all()):
        return Piece(rows, queries, keys, Causal() & Window(window))
    beyond: Mask = Explicit()
    return Piece(rows, queries, keys, Causal() & beyond if sight.causal else beyond, shown[:, None])
