"""SEA: a small map of where attention goes, estimated in linear time, picks the keys of exact sparse attention (id 168; Lee et al., 2023).

P^ = softmax(CNN(MLP([Performer(q, k, [place; v]); v]))) (T x K),  mask = expand(top cells of P^),  o = g sparse softmax(q k^T / sqrt(d)) v + (1 - g) average of v
`distil_sea` trains one for each layer of a pretrained decoder or encoder, on its own queries, keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Causal
from regard.catalog import get
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.parts import takes
from regard.taps import fit_to_heads, read, sites


def lengths_of(length: int, causal: bool, device: torch.device) -> Tensor:
    """(T, 1): how many tokens each row's map is spread over."""
    every = torch.full((length, 1), length, device=device)
    return torch.arange(1, length + 1, device=device)[:, None] if causal else every


def cells_of(length: int, cells: int, causal: bool, device: torch.device) -> Tensor:
    """(T, T): the cell c of each row's map that token j falls into, floor(j K / len)."""
    j = torch.arange(length, device=device)
    return (j * cells // lengths_of(length, causal, device)).clamp_max(cells - 1)


def expand(estimate: Tensor, causal: bool) -> Tensor:
    """A map (B, H, T, K) spread over tokens, (B, H, T, T), rows summing to one: each cell's share divided evenly among its tokens."""
    length, cells = estimate.shape[-2:]
    at = cells_of(length, cells, causal, estimate.device)
    p = estimate.gather(-1, at.expand(*estimate.shape[:2], -1, -1))
    p = p.tril() if causal else p
    return p / p.sum(-1, keepdim=True).clamp_min(1e-30)


def chosen_cells(estimate: Tensor, keys: int, causal: bool, grouped: bool = True) -> Tensor:
    """(B, H, T, K) bool: the cells of largest estimate, so many that about `keys` tokens a row are kept; at least one a row. grouped: heads of
    a row share a budget H times as large (each row keeps at least one cell a head)."""
    h, length, cells = estimate.shape[1:]
    spread = lengths_of(length, causal, estimate.device)
    wanted = (keys * cells / spread).ceil().clamp(1, cells).long()[:, 0]
    if not grouped:
        rank = estimate.argsort(-1, descending=True).argsort(-1)
        return rank < wanted[:, None]
    flat = estimate.transpose(1, 2).flatten(-2)  # (B, T, H K)
    rank = flat.argsort(-1, descending=True).argsort(-1)
    keep = (rank < (h * wanted)[:, None]).unflatten(-1, (h, cells)).transpose(1, 2)
    return keep | F.one_hot(estimate.argmax(-1), cells).bool()


def kept_tokens(estimate: Tensor, keys: int, causal: bool, grouped: bool = True) -> Tensor:
    """(B, H, T, T) bool: the tokens of the chosen cells."""
    length, cells = estimate.shape[-2:]
    keep = chosen_cells(estimate, keys, causal, grouped)
    at = cells_of(length, cells, causal, estimate.device)
    seen = keep.gather(-1, at.expand(*estimate.shape[:2], -1, -1))
    if causal:
        seen = seen.tril()
        own = torch.eye(length, dtype=torch.bool, device=seen.device)
        seen = seen | (own & ~seen.any(-1, keepdim=True))
    return seen


class SparseRows(NamedTuple):
    """Kept tokens as lists: at (B, H, T, most), real (B, H, T, most)."""

    at: Tensor
    real: Tensor


def listed(estimate: Tensor, keys: int, causal: bool, grouped: bool = True) -> SparseRows:
    """The kept tokens of every row without any T x T tensor: each chosen cell's tokens in turn."""
    b, h, length, cells = estimate.shape
    keep = chosen_cells(estimate, keys, causal, grouped)
    spread = lengths_of(length, causal, estimate.device)
    c = torch.arange(cells, device=estimate.device)
    start, stop = -(-c * spread // cells), -(-(c + 1) * spread // cells)  # tokens j with floor(j K / len) = c
    most_cells, most = int(keep.sum(-1).max()), int((stop - start).max())
    order = keep.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :most_cells]
    chosen = keep.gather(-1, order)
    a, z = (x.expand(b, h, -1, -1).gather(-1, order) for x in (start, stop))
    index = a[..., None] + torch.arange(most, device=estimate.device)
    real = (index < z[..., None]) & chosen[..., None]
    index, real = index.flatten(-2), real.flatten(-2)
    if causal:
        own = torch.arange(length, device=estimate.device)[:, None].expand(b, h, -1, 1)
        alone = ~real.any(-1, keepdim=True)
        index, real = torch.cat((index, own), -1), torch.cat((real, alone), -1)
    return SparseRows(index.clamp_max(length - 1), real)


def sparse_softmax(q: Tensor, k: Tensor, v: Tensor, rows: SparseRows, block: int = 256) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over each row's listed keys, in blocks of rows."""
    outs = []
    for start in range(0, q.shape[2], block):
        index, real = rows.at[:, :, start : start + block], rows.real[:, :, start : start + block]
        at = index.flatten(2)[..., None]
        keys, values = (x.gather(2, at.expand(-1, -1, -1, x.shape[-1])).unflatten(2, index.shape[2:]) for x in (k, v))
        s = (keys @ q[:, :, start : start + block, :, None])[..., 0] * q.shape[-1] ** -0.5
        p = s.masked_fill(~real, -math.inf).softmax(-1)
        outs.append((p[..., None, :] @ values)[..., 0, :])
    return torch.cat(outs, 2)


class CausalConv2d(nn.Module):
    """A 3 x 3 convolution over (rows = time, columns) that reads no later row; dilation over time."""

    def __init__(self, channels: int, out: int, dilation: int = 1):
        super().__init__()
        self.dilation, self.conv = dilation, nn.Conv2d(channels, out, 3, dilation=(dilation, 1), padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 0, 2 * self.dilation, 0)))  # type: ignore[no-any-return]


class Estimate(NamedTuple):
    """probabilities (B, H, T, K) and logits of the small map; gates: s0 and s1 (B, H, T, 1)."""

    probabilities: Tensor
    logits: Tensor
    gates: tuple[Tensor, Tensor]


@register("sea", kind="module")
class SEAAttention(nn.Module):
    """q, k, v (B, H, T, d) of a layer -> (B, H, T, d), by exact softmax over the keys that an estimated map picks.

    cells: K, the width of the map. keys: about how many a row keeps. causal: the decoder's form; max_len: of its learned places. features: of the
    Performer. grouped: heads of a row share their budget. `estimate` gives the map, `losses` what distils it from a teacher's q and k.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        cells: int = 64,
        keys: int = 32,
        causal: bool = False,
        max_len: int = 2048,
        features: int = 32,
        grouped: bool = True,
    ):
        super().__init__()
        self.head_dim = head_dim
        shrink = 4 if causal else 1
        if cells % shrink:
            raise RegardError(f"cells={cells}; expected a multiple of {shrink}")
        d = head_dim
        self.heads, self.cells, self.keys, self.causal, self.grouped = heads, cells, keys, causal, grouped
        self.place = nn.Parameter(0.02 * torch.randn(max_len, d)) if causal else None
        self.performer = get("performer", features=features, causal=causal)
        self.encoder = nn.Sequential(nn.Linear(3 * d, 2 * d), nn.LayerNorm(2 * d), nn.GELU())
        self.gates = nn.Linear(2 * d, 2)
        width = cells // shrink
        self.decoder = nn.Linear(2 * d, width)
        if causal:
            self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(cells)
            self.convs = nn.ModuleList([CausalConv2d(heads, heads), CausalConv2d(heads, heads, 2)])
            self.last = nn.Conv2d(heads, heads, 1)
        else:
            self.convs = nn.ModuleList([nn.Conv2d(heads, heads, 3, (2, 1), 1), nn.Conv2d(heads, heads, 3, padding=1)])
            self.last = nn.Conv2d(heads, heads, 3, padding=1)

    def places(self, length: int, like: Tensor) -> Tensor:
        """(T, d): learned, or the identity resampled to T rows: where along the sequence a context comes from."""
        if self.place is not None:
            if length > len(self.place):
                raise RegardError(f"length {length} is over max_len={len(self.place)}")
            return self.place[:length].to(like.dtype)
        eye = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
        return F.interpolate(eye[None], size=length, mode="linear").squeeze(0).T

    def estimate(self, q: Tensor, k: Tensor, v: Tensor) -> Estimate:
        place = self.places(q.shape[2], v).expand(*v.shape[:3], -1)
        context = attend(q, k, torch.cat((place, v), -1), self.performer, mask=Causal() if self.causal else None)
        e = self.encoder(torch.cat((context, v), -1))
        x = self.decoder(e)
        if self.causal:
            x = self.norm_in(x)
            for conv in self.convs:
                x = F.relu(conv(x))
            x = self.norm_out(self.last(x.repeat_interleave(4, -1)))
        else:
            for conv in self.convs:
                x = F.relu(conv(x))
            x = self.last(F.interpolate(x, size=(q.shape[2], x.shape[-1]), mode="nearest"))
        s = self.gates(e)
        return Estimate(x.softmax(-1), x, (s[..., :1], s[..., 1:]))

    def average(self, v: Tensor, estimate: Tensor) -> Tensor:
        """Causal: the running mean of v; else the mean of v in each cell weighed by the map."""
        if self.causal:
            return v.cumsum(2) / torch.arange(1, v.shape[2] + 1, device=v.device, dtype=v.dtype)[:, None]
        length = v.shape[2]
        cell = torch.arange(length, device=v.device) * self.cells // length
        kind = F.one_hot(cell, self.cells).to(v.dtype)
        return estimate @ ((kind.T @ v) / kind.sum(0).clamp_min(1)[:, None])

    def combined(self, q: Tensor, k: Tensor, v: Tensor, found: Estimate) -> Tensor:
        with torch.no_grad():
            rows = listed(found.probabilities, self.keys, self.causal, self.grouped)
        sparse = sparse_softmax(q, k, v, rows) * torch.sigmoid(found.gates[0])
        share = torch.sigmoid(found.gates[1])
        return share * sparse + (1 - share) * self.average(v, found.probabilities)

    @takes(q="batch heads length head_dim", k="batch heads length head_dim", v="batch heads length head_dim")
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.combined(q, k, v, self.estimate(q, k, v))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(the expanded estimate, the sparse softmax's matrix), (B, H, T, T), to look at."""
        found = self.estimate(q, k, v).probabilities
        seen = kept_tokens(found, self.keys, self.causal, self.grouped)
        s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -math.inf)
        return expand(found, self.causal), s.softmax(-1)

    def losses(self, q: Tensor, k: Tensor, v: Tensor, kl_weight: float = 0.1) -> dict[str, Tensor]:
        """Against the dense attention of the same q, k, v: "kl" (teacher || expanded estimate), "probabilities" and "output" (mean squares), and
        their "total" with the KL weighed by kl_weight."""
        mask = Causal() if self.causal else None
        s = q @ k.mT * q.shape[-1] ** -0.5
        teacher = (s.masked_fill(torch.ones_like(s).triu(1).bool(), -math.inf) if self.causal else s).softmax(-1).detach()
        found = self.estimate(q, k, v)
        student = expand(found.probabilities, self.causal)
        kl = (torch.special.xlogy(teacher, teacher) - teacher * student.clamp_min(1e-12).log()).sum(-1).mean()
        output = (self.combined(q, k, v, found) - attend(q, k, v, mask=mask).detach()).square().mean()
        probabilities = (student - teacher).square().sum(-1).mean()
        return {"kl": kl, "probabilities": probabilities, "output": output, "total": kl_weight * kl + probabilities + output}


def distil_sea(
    model: nn.Module, draw: Callable[[torch.Generator], Any], steps: int, *, layers: Iterable[int] | None = None, lr: float = 1e-3, seed: int = 0,
    **options: Any,
) -> tuple[dict[int, SEAAttention], dict[int, list[float]]]:  # fmt: skip
    """A `SEAAttention` for each layer of a tapped model (or those of `layers`), trained on `losses` against that layer's dense attention; and the losses.
    draw, lr, seed: as of `regard.taps.fit_to_heads`; options: of the layers (causal=True for decoders)."""
    chosen = list(range(len(sites(model))) if layers is None else layers)
    batch = draw(torch.Generator().manual_seed(seed))
    with torch.no_grad(), read(model, "q", layers=chosen) as seen:
        model(**batch) if isinstance(batch, dict) else model(batch)
    torch.manual_seed(seed)
    made = {at: SEAAttention(seen["q", at].shape[1], seen["q", at].shape[-1], **options) for at in chosen}
    like = next(model.parameters())
    for one in made.values():
        one.to(like.device, like.dtype)

    def loss(part: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert isinstance(part, SEAAttention)
        return part.losses(q, k, v)["total"]

    return made, fit_to_heads(model, made, loss, draw, steps, lr=lr, seed=seed)
