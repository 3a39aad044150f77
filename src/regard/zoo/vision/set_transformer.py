"""Set Transformer: attention blocks that are equivariant to the order of a set (id 255; Lee et al., 2018).

MAB(X, Y) = LN(H + relu(H W_o)),  H = LN(X W_q + softmax(X W_q (Y W_k)^T / sqrt(d)) Y W_v)
SAB(X) = MAB(X, X);  ISAB_m(X) = MAB(X, MAB(I, X));  PMA_k(Z) = MAB(S, rFF(Z)), with I and S learned
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.algebra import Padding
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.parts import takes


class MAB(nn.Module):
    """Multihead attention block: x (B, n, dim_x), y (B, m, dim_y) -> (B, n, dim).

    The released form: the residual is the projected query, heads are not projected again, and the scale is dim ** -0.5, not
    head_dim ** -0.5 (paper_scale=True for the latter). norm: LayerNorm, off in the released default.
    """

    def __init__(self, dim_x: int, dim_y: int, dim: int, heads: int, norm: bool = False, paper_scale: bool = False):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads if paper_scale else dim) ** -0.5
        self.q, self.k, self.v, self.out = nn.Linear(dim_x, dim), nn.Linear(dim_y, dim), nn.Linear(dim_y, dim), nn.Linear(dim, dim)
        self.norm1, self.norm2 = (nn.LayerNorm(dim) if norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, y: Tensor, keep: Tensor | None = None) -> Tensor:
        """keep (B, m) bool: which elements of y exist (None: all)."""
        projected = self.q(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (projected, self.k(y), self.v(y)))
        if keep is not None:
            v = torch.where(keep[:, None, :, None], v, 0.0)  # whatever stands in padded places must not reach a product
            k = torch.where(keep[:, None, :, None], k, 0.0)
            read = attend(q, k, v, "softmax", mask=Padding(), scale=self.scale, keep=keep)
        else:
            read = attend(q, k, v, "softmax", scale=self.scale)
        h = self.norm1(projected + read.transpose(1, 2).flatten(-2))
        return self.norm2(h + torch.relu(self.out(h)))  # type: ignore[no-any-return]


class SAB(nn.Module):
    """Set attention block: (B, n, dim_in) -> (B, n, dim), O(n^2)."""

    def __init__(self, dim_in: int, dim: int, heads: int, norm: bool = False):
        super().__init__()
        self.mab = MAB(dim_in, dim_in, dim, heads, norm)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.mab(x, x, keep)  # type: ignore[no-any-return]


class ISAB(nn.Module):
    """Induced set attention block: through `inducing` learned points, O(n * inducing)."""

    def __init__(self, dim_in: int, dim: int, heads: int, inducing: int, norm: bool = False):
        super().__init__()
        self.points = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, inducing, dim)))
        self.gather, self.spread = MAB(dim, dim_in, dim, heads, norm), MAB(dim_in, dim, dim, heads, norm)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.spread(x, self.gather(self.points.expand(x.shape[0], -1, -1), x, keep))  # type: ignore[no-any-return]


class PMA(nn.Module):
    """Pooling by attention to `seeds` learned vectors: (B, n, dim) -> (B, seeds, dim). rff: the paper's row-wise layer on the input."""

    def __init__(self, dim: int, heads: int, seeds: int, norm: bool = False, rff: bool = False):
        super().__init__()
        self.seeds = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, seeds, dim)))
        self.rff = nn.Sequential(nn.Linear(dim, dim), nn.ReLU()) if rff else nn.Identity()
        self.mab = MAB(dim, dim, dim, heads, norm)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.mab(self.seeds.expand(x.shape[0], -1, -1), self.rff(x), keep)  # type: ignore[no-any-return]


@register("set-transformer", kind="module")
class SetTransformer(nn.Module):
    """Encoder (two ISAB, or SAB when inducing is 0) and decoder (PMA, `mixers` SAB, linear): (B, n, dim_in) -> (B, outputs, dim_out). mixers: 1 in the
    paper's formula, 2 in the released net."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        dim: int = 128,
        heads: int = 4,
        inducing: int = 32,
        outputs: int = 1,
        norm: bool = False,
        mixers: int = 1,
    ):
        super().__init__()
        if mixers < 0:
            raise RegardError(f"mixers={mixers}; expected 0 or more")
        self.dim_in = dim_in
        widths = (dim_in, dim)
        self.encoder = nn.ModuleList([ISAB(w, dim, heads, inducing, norm) if inducing else SAB(w, dim, heads, norm) for w in widths])
        self.pool, self.head = PMA(dim, heads, outputs, norm), nn.Linear(dim, dim_out)
        self.mix = nn.Sequential(*[SAB(dim, dim, heads, norm) for _ in range(mixers)])

    @takes(x="batch items dim_in")
    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """keep (B, n) bool: which elements exist."""
        for layer in self.encoder:
            x = layer(x, keep)
        return self.head(self.mix(self.pool(x, keep)))  # type: ignore[no-any-return]
