"""Select and pack attention: tokens that a gate keeps are packed into full rows and attend within their own image (id 273; Zhang et al., 2024).

s_i = sigmoid(w . x_i + b), keep_i = [s_i > 1/2], straight through;  L_sel = BCE(s, y), y_i = 1 where the patch overlaps an object
kept tokens of all images, first fit into packages of L, padded;  attention where segment_i = segment_j;  the others pass by
Cost sum_b n_b^2 in place of B N^2. The abstract leaves noise, weights and labels open; these are the straightforward ones. In windows, each window
is what an image is above: its kept tokens attend among themselves, and windows of all images share packages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Segments
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.images.patch_net import FeedForward
from regard.nn.images.planes import Patches
from regard.nn.images.windows import from_windows, to_windows
from regard.nn.parts import takes


class SelectGate(nn.Module):
    """x (B, N, dim) -> (scores (B, N) before the sigmoid, keep (B, N) bool, factor (B, N)): factor is 1 for kept tokens and 0 for others, with the
    gradient of the sigmoid. noise: logistic, times this, on the scores in training (Gumbel's between two)."""

    def __init__(self, dim: int, noise: float = 0.0):
        super().__init__()
        self.dim, self.noise, self.score = dim, noise, nn.Linear(dim, 1)

    @takes(x="batch tokens dim")
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = moved = self.score(x)[..., 0]
        if self.training and self.noise:
            u = torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)
            moved = scores + self.noise * (u.log() - (1 - u).log())
        soft = torch.sigmoid(moved)
        keep = soft > 0.5
        return scores, keep, keep.to(soft.dtype) + soft - soft.detach()


class Packed(NamedTuple):
    """tokens (P, L, C); segments (P, L): the image of each, B for padding; numbers (P, L): its number among all B N tokens, 0 for padding; real (P, L)."""

    tokens: Tensor
    segments: Tensor
    numbers: Tensor
    real: Tensor

    @property
    def pairs(self) -> int:
        """Pairs of tokens that see one another."""
        same = (self.segments[:, :, None] == self.segments[:, None]) & self.real[:, :, None] & self.real[:, None]
        return int(same.sum())


def first_fit(counts: Sequence[int], length: int) -> list[list[tuple[int, int, int]]]:
    """Packages of (image, first, last + 1): each image into the first with room; one longer than `length` in pieces of it."""
    packages: list[list[tuple[int, int, int]]] = []
    room: list[int] = []
    for image, count in enumerate(counts):
        for start in range(0, count, length):
            stop = min(start + length, count)
            at = next((i for i, left in enumerate(room) if left >= stop - start), None)
            if at is None:
                packages.append([])
                room.append(length)
                at = len(room) - 1
            packages[at].append((image, start, stop))
            room[at] -= stop - start
    return packages


def pack(x: Tensor, keep: Tensor, length: int | None = None) -> Packed:
    """Kept tokens of x (B, N, C), keep (B, N) bool, in packages of `length` (None: the most that an image keeps, so that none is split)."""
    if x.dim() != 3 or keep.shape != x.shape[:2] or keep.dtype != torch.bool:
        raise RegardError(f"x {tuple(x.shape)}, keep {tuple(keep.shape)} of {keep.dtype}; expected (B, N, C) and (B, N) bool")
    counts = keep.sum(1).tolist()
    length = max(1, *counts) if length is None and counts else length or 1
    if length < 1:
        raise RegardError(f"length={length}; expected at least 1")
    packages = first_fit(counts, length)
    shape = (len(packages), length)
    segments, numbers = torch.full(shape, len(x), dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    places = [row.nonzero()[:, 0] + at * x.shape[1] for at, row in enumerate(keep.cpu())]
    for row, parts in enumerate(packages):
        at = 0
        for image, start, stop in parts:
            segments[row, at : at + stop - start] = image
            numbers[row, at : at + stop - start] = places[image][start:stop]
            at += stop - start
    segments, numbers = segments.to(x.device), numbers.to(x.device)
    real = segments < len(x)
    return Packed(torch.where(real[..., None], x.flatten(0, 1)[numbers], 0.0), segments, numbers, real)


def unpack(tokens: Tensor, packed: Packed, base: Tensor) -> Tensor:
    """`base` (B, N, C) with what stands in the packages, tokens (P, L, C), put in its places."""
    flat = base.flatten(0, 1)
    return flat.index_put((packed.numbers[packed.real],), tokens[packed.real].to(flat.dtype)).view_as(base)


@register("spa", kind="module")
class SelectPackAttention(nn.Module):
    """x (B, N, dim) -> (y (B, N, dim), scores (B, N)): y is what attention within each image's kept tokens adds to them, 0 for the others.

    length: of packages (None: no image is split; images longer than it attend within their pieces). keep in the call: which tokens, in place of
    the gate's. noise: of `SelectGate`.
    """

    def __init__(self, dim: int, heads: int, length: int | None = None, qkv_bias: bool = True, noise: float = 0.0):
        super().__init__()
        if dim % heads or (length is not None and length < 1):
            raise RegardError(f"dim={dim}, heads={heads}, length={length}; expected a multiple of heads, and at least 1")
        self.dim, self.heads, self.length = dim, heads, length
        self.gate, self.qkv, self.out = SelectGate(dim, noise), nn.Linear(dim, 3 * dim, qkv_bias), nn.Linear(dim, dim)

    def inside(self, packed: Packed) -> Tensor:
        """Attention in packages (P, L, dim)."""
        if not packed.tokens.shape[0]:
            return packed.tokens
        q, k, v = self.qkv(packed.tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        read = attend(q, k, v, mask=Segments(), segments=packed.segments)
        return self.out(read.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    @takes(x="batch tokens dim", keep="batch tokens")
    def forward(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores, chosen, factor = self.gate(x)
        packed = pack(x, chosen if keep is None else keep, self.length)
        y = unpack(self.inside(packed), packed, torch.zeros_like(x))
        return (y * factor[..., None] if keep is None else y), scores


class SelectPackBlock(nn.Module):
    """x + attention(LN x), then + MLP(LN x), kept tokens alone; the others are left bit for bit: x (B, N, dim) -> (as x, scores (B, N)).

    window: of size x size tokens, which attend apart (0: none, the whole image); they start `shift` behind the first token, and are smaller at borders.
    """

    def __init__(
        self, dim: int, heads: int, length: int | None = None, ratio: float = 4.0, noise: float = 0.0, window: int = 0, shift: int = 0
    ):
        super().__init__()
        if window < 0 or not 0 <= shift < max(window, 1):
            raise RegardError(f"window={window}, shift={shift}; expected from 0, and from 0 to below window")
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.mlp = SelectPackAttention(dim, heads, length, noise=noise), FeedForward(dim, int(ratio * dim))
        self.window, self.shift = window, shift

    def chosen(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All of each row of x (B, N, dim) as one image; real (B, N) bool: tokens that exist."""
        y = self.norm1(x)
        scores, keep, factor = self.attention.gate(y)
        keep = keep if real is None else keep & real
        packed = pack(y, keep, self.attention.length)
        own = pack(x, keep, self.attention.length).tokens + self.attention.inside(packed)
        done = own + self.mlp(self.norm2(own)) if len(own) else own
        full = unpack(done, packed, x)
        return x + (full - x) * factor[..., None], scores

    def forward(self, x: Tensor, shape: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """shape (h, w): the grid that x is, row by row, for windows."""
        if not self.window:
            return self.chosen(x)
        if x.dim() != 3 or shape is None or shape[0] * shape[1] != x.shape[1]:
            raise RegardError(f"x {tuple(x.shape)}, shape={shape}; expected (batch, h w, dim) and shape=(h, w), for windows")
        size, front = self.window, -self.shift % self.window
        behind = [-(n + front) % size for n in shape]

        def tiles(y: Tensor) -> Tensor:
            return to_windows(F.pad(y.unflatten(1, shape), (0, 0, front, behind[1], front, behind[0])), size)

        real = tiles(x.new_ones(1, x.shape[1], 1))[..., 0] > 0
        out, scores = self.chosen(tiles(x), real.repeat(len(x), 1))
        height, width = (n + front + extra for n, extra in zip(shape, behind, strict=True))
        rows, columns = (slice(front, front + n) for n in shape)
        out, scores = (from_windows(y, size, height, width)[:, rows, columns].flatten(1, 2) for y in (out, scores[..., None]))
        return out, scores[..., 0]


class SelectPackNet(nn.Module):
    """Images (B, channels, H, W) -> (logits (B, classes), scores of each block, list of (B, h, w)): patches, blocks, merging by 2 x 2 between stages,
    mean. Kept tokens are chosen anew in each block. windows: of each stage's blocks, 0 for none; every second block's are moved by half."""

    def __init__(
        self,
        dims: Sequence[int] = (96, 192),
        depths: Sequence[int] = (2, 2),
        heads: Sequence[int] = (3, 6),
        channels: int = 3,
        classes: int = 10,
        patch: int = 4,
        length: int | None = None,
        noise: float = 0.0,
        windows: Sequence[int] | None = None,
    ):
        super().__init__()
        windows = [0] * len(dims) if windows is None else windows
        if not len(dims) == len(depths) == len(heads) == len(windows):
            counts = [len(one) for one in (dims, depths, heads, windows)]
            raise RegardError(f"dims, depths, heads, windows name {counts} stages; expected as many of each")
        inner = (channels, *dims[:-1])
        self.channels = channels
        self.patches = nn.ModuleList([Patches(i, o, 2 if at else patch) for at, (i, o) in enumerate(zip(inner, dims, strict=True))])
        self.stages = nn.ModuleList(
            [
                nn.ModuleList([SelectPackBlock(d, h, length, noise=noise, window=w, shift=w // 2 * (at % 2)) for at in range(n)])
                for d, n, h, w in zip(dims, depths, heads, windows, strict=True)
            ]
        )
        self.norm, self.head = nn.LayerNorm(dims[-1]), nn.Linear(dims[-1], classes)

    @takes(images="batch channels height width")
    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, found = images, []
        for patches, blocks in zip(self.patches, self.stages, strict=True):
            x = patches(x)
            shape, x = x.shape[2:], x.flatten(2).mT
            for block in blocks.children():
                x, scores = block(x, tuple(shape))
                found.append(scores.unflatten(1, shape))
            x = x.mT.unflatten(-1, shape)
        return self.head(self.norm(x.mean((2, 3)))), found


def selection_labels(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Object masks (B, H, W) bool -> (B, h, w) bool: which cells of a grid overlap an object."""
    return F.adaptive_max_pool2d(mask[:, None].float(), tuple(shape))[:, 0] > 0


def selection_loss(scores: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean over blocks of BCE(sigmoid(scores), labels at their grid), scores (B, h, w) each, mask (B, H, W)."""
    terms = [F.binary_cross_entropy_with_logits(s, selection_labels(mask, s.shape[1:]).to(s.dtype)) for s in scores]
    return torch.stack(terms).mean()
