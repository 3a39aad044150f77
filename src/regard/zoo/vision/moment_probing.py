"""Moment probing: a classifier of a frozen model's mean and of covariances between heads of its tokens (id 190; Gao et al., 2023).

P = W tokens, cut into h heads;  H_i = LN(P_i) less the mean of all its entries;  C_i = H_i^T H_{i+1} / N, columns of length one
second = W_2 flatten(conv(gelu(conv(C_1 ... C_{h-1})))), 3 x 3 of stride 2;  logits = (W_1 first + second) / 2
PSRP in a frozen block: x <- x + attn, [g, b] = U relu(D x),  x <- x + (1 + g) MLP(LN x) + b
"""

from __future__ import annotations

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.vit_host import attention, frozen
from regard.nn.parts import takes

PAIRS = ("near", "half", "first", "all")


def smaller(size: int) -> int:
    return (size - 3) // 2 + 1


class CrossCovHead(nn.Module):
    """tokens (B, N, dim) -> (B, matrices * s * s): covariances between heads, two convolutions of stride 2 smaller.

    pairs: heads i and i + 1 ("near"), i and i + heads/2 ("half"), the first and each other ("first"), or all pairs ("all", whose columns are not
    normed, as released).
    """

    def __init__(self, dim: int, proj: int = 512, heads: int = 4, pairs: str = "near", eps: float = 1e-5):
        super().__init__()
        if pairs not in PAIRS or heads < 2 or proj % heads or (pairs == "half" and heads % 2):
            raise RegardError(
                f"pairs={pairs!r}, heads={heads}, proj={proj}; expected one of {PAIRS}, two heads or more, and a multiple of heads"
            )
        width, self.dim, self.heads = proj // heads, dim, heads
        self.side = smaller(smaller(width))
        if self.side < 1:
            raise RegardError(f"proj={proj}, heads={heads}: heads of {width} channels; expected at least 7")
        chosen = {"near": [(i, i + 1) for i in range(heads - 1)], "half": [(i, i + heads // 2) for i in range(heads // 2)]}
        chosen["first"] = [(0, i) for i in range(1, heads)]
        self.pairs, self.normed = chosen.get(pairs, list(combinations(range(heads), 2))), pairs != "all"
        count = len(self.pairs)
        self.size = count * self.side**2
        self.proj, self.norm = nn.Linear(dim, proj), nn.LayerNorm(width, eps)
        self.convs = nn.Sequential(nn.Conv2d(count, count, 3, 2, bias=False), nn.GELU(), nn.Conv2d(count, count, 3, 2, bias=False))

    @takes(tokens="batch count dim")
    def covariances(self, tokens: Tensor) -> Tensor:
        """(B, matrices, width, width)."""
        if tokens.shape[1] == 0:
            raise RegardError("tokens are none; expected at least one a sample")
        h = self.norm(self.proj(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2))
        h = h - h.mean((2, 3), keepdim=True)
        first, second = (h[:, [pair[at] for pair in self.pairs]] for at in range(2))
        found = first.mT @ second / tokens.shape[1]
        return F.normalize(found, dim=2) if self.normed else found

    def forward(self, tokens: Tensor) -> Tensor:
        return self.convs(self.covariances(tokens)).flatten(1)  # type: ignore[no-any-return]


@register("moment-probing", kind="module")
class MomentProbe(nn.Module):
    """tokens (B, N, dim) without the class token, and first (B, dim), the class token (None: the tokens' mean) -> logits (B, classes).

    mean_norm: a LayerNorm of eps 1e-6 on `first`, as on maps of ConvNeXt. proj, heads, pairs: of `CrossCovHead`.
    """

    def __init__(self, dim: int, classes: int, proj: int = 512, heads: int = 4, pairs: str = "near", mean_norm: bool = False):
        super().__init__()
        self.dim = dim
        self.norm = nn.LayerNorm(dim, 1e-6) if mean_norm else nn.Identity()
        self.second = CrossCovHead(dim, proj, heads, pairs)
        self.head1, self.head2 = nn.Linear(dim, classes), nn.Linear(self.second.size, classes)

    @takes(tokens="batch count dim", first="batch dim")
    def forward(self, tokens: Tensor, first: Tensor | None = None) -> Tensor:
        mean = self.norm(tokens.mean(1) if first is None else first)
        return (self.head1(mean) + self.head2(self.second(tokens))) / 2  # type: ignore[no-any-return]


class PSRP(nn.Module):
    """x (..., dim) -> (scale, shift) of the same shape: two projections up from one of `rank` with ReLU, no biases."""

    def __init__(self, dim: int, rank: int = 16):
        super().__init__()
        self.down, self.scale, self.shift = nn.Linear(dim, rank, False), nn.Linear(rank, dim, False), nn.Linear(rank, dim, False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.down(x))
        return self.scale(h), self.shift(h)


class PSRPBlock(nn.Module):
    """A frozen block of a ViT whose MLP is scaled and shifted token by token."""

    def __init__(self, block: nn.Module, dim: int, rank: int = 16):
        super().__init__()
        self.block, self.psrp = block, PSRP(dim, rank)

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        x = x + block.drop_path1(block.ls1(attention(block.attn, block.norm1(x))))  # type: ignore[operator]
        scale, shift = self.psrp(x)
        return x + block.drop_path2(block.ls2((1 + scale) * block.mlp(block.norm2(x)) + shift))  # type: ignore[no-any-return, operator]


class MomentProbedViT(nn.Module):
    """Images -> logits of a `MomentProbe` on a frozen ViT (its class token normed as its own head does); rank > 0: with PSRP of that rank in
    every block (MP+)."""

    def __init__(self, vit: nn.Module, classes: int, rank: int = 0, proj: int = 512, heads: int = 4, pairs: str = "near"):
        super().__init__()
        self.vit = frozen(vit)
        dim = self.vit.embed_dim
        if rank:
            self.vit.blocks = nn.Sequential(*[PSRPBlock(block, dim, rank) for block in self.vit.blocks])
        self.probe = MomentProbe(dim, classes, proj, heads, pairs)

    def train(self, mode: bool = True) -> MomentProbedViT:
        super().train(mode)
        self.vit.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        x, prefix = self.vit.forward_features(images), self.vit.num_prefix_tokens
        return self.probe(x[:, prefix:], self.vit.fc_norm(x[:, 0]) if prefix else None)  # type: ignore[no-any-return]
