"""Kernelised attention with relative positions in O(N log N): Toeplitz products by FFT (id 184; Luo et al., 2021).

o_i = phi(q_i) D_i / phi(q_i) d_i,   [D_i, d_i] = sum_j e^{b_{j-i}} phi(k_j) [v_j^T, 1]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Sizes
from regard.algebra.feature_map import orthogonal_gaussian, positive_random
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.parts import takes

SLICE = 1 << 24  # numbers of the N x features x values block worked on at once


def fast_length(n: int) -> int:
    """The least 2^a 3^b 5^c that is at least n: a length at which FFTs are fast."""
    best = 1 << (n - 1).bit_length()
    for b in range(math.ceil(math.log(n, 3)) + 1):
        for c in range(math.ceil(math.log(n, 5)) + 1):
            odd = 3**b * 5**c
            if odd < best:
                best = min(best, odd << max(0, (-(-n // odd) - 1).bit_length()))
    return best


def toeplitz(kernel: Tensor, x: Tensor, grid: Sequence[int]) -> Tensor:
    """y_i = sum_j kernel[j - i + size - 1] x_j along each axis of the grid: kernel (H, 2 n_1 - 1, ...), x (B, H, n_1, ..., F) -> as x."""
    axes = list(range(2, 2 + len(grid)))
    sizes = [fast_length(2 * n - 1) for n in grid]
    # y_i takes x_j at offset j - i: a correlation, which is a convolution with the flipped kernel.
    wide = torch.promote_types(x.dtype, torch.float32)  # there are no half-precision transforms on a CPU
    flipped = torch.fft.rfftn(kernel.to(wide).flip([axis - 1 for axis in axes]), s=sizes, dim=[axis - 1 for axis in axes])
    spectrum = torch.fft.rfftn(x.to(wide), s=sizes, dim=axes) * flipped[None, ..., None]
    full = torch.fft.irfftn(spectrum, s=sizes, dim=axes)
    for axis, n in zip(axes, grid, strict=True):
        full = full.narrow(axis, n - 1, n)
    return full.to(x.dtype)


def kernel_attention_rpe(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, bias: Tensor, causal: bool = False, grid: Sequence[int] | None = None, eps: float = 0.0
) -> Tensor:
    """phi_q, phi_k (B, H, N, m), v (B, H, N, Dv), bias (H, 2N - 1) with b_{j-i} at j - i + N - 1 -> (B, H, N, Dv).

    grid: (n_1, n_2, ...) with product N, for tokens in row order and a bias (H, 2 n_1 - 1, 2 n_2 - 1, ...). causal: j <= i (sequences).
    """
    n, heads = v.shape[-2], v.shape[1]
    grid = (n,) if grid is None else tuple(grid)
    wanted = (heads, *(2 * size - 1 for size in grid))
    if math.prod(grid) != n or tuple(bias.shape) != wanted:
        raise RegardError(f"bias has shape {tuple(bias.shape)}; expected {wanted} for {n} tokens on the grid {grid}")
    if causal and len(grid) > 1:
        raise RegardError("causal=True: a grid has no order; expected grid=None")
    c = torch.exp(bias - bias.amax(tuple(range(1, bias.dim())), keepdim=True).detach())
    if causal:
        c = torch.cat((c[:, :n], torch.zeros_like(c[:, n:])), -1)
    wide = F.pad(v, (0, 1), value=1.0)
    total: Tensor | None = None
    step = max(1, SLICE // (v.shape[0] * heads * n * wide.shape[-1]))
    for at in range(0, phi_k.shape[-1], step):  # all features at once would be N x m x Dv
        part = phi_k[..., at : at + step, None] * wide[..., None, :]
        mixed = toeplitz(c, part.flatten(-2).unflatten(2, grid), grid).flatten(2, 1 + len(grid)).unflatten(-1, part.shape[-2:])
        out = (phi_q[..., at : at + step, None] * mixed).sum(-2)
        total = out if total is None else total + out
    assert total is not None
    return total[..., :-1] / (total[..., -1:] + eps)


def normalised_features(q: Tensor, k: Tensor, projection: Tensor, scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Positive random features of q / |q| and k / |k|, each times sqrt(scale): their products estimate exp(scale cos(q, k))."""
    made = [positive_random(F.normalize(x, dim=-1) * scale**0.5, projection, 0.0, False) for x in (q, k)]
    return made[0], made[1]


@register("kernelized-attention-rpe", kind="module")
class NormalizedPerformerRPE(torch.nn.Module):
    """q, k (B, H, N, D), v (B, H, N, Dv) -> (B, H, N, Dv): Performer features of unit q and k with a learned bias b_{j-i} a head, from 0.

    features: m, about D. reach: offsets with a bias of their own; those beyond share the outermost, so that any length runs. scale: of the
    cosine, learned through the projections in the paper. grid: as of `kernel_attention_rpe` (reach is then the largest side).
    """

    projection: Tensor

    def __init__(
        self,
        heads: int,
        head_dim: int,
        features: int = 64,
        reach: int = 512,
        causal: bool = False,
        scale: float = 1.0,
        axes: int = 1,
        seed: int = 0,
    ):
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        if axes not in (1, 2) or (causal and axes > 1):
            raise RegardError(f"axes={axes}, causal={causal}: expected 1 or 2 axes, and no order on a grid")
        self.causal, self.scale, self.reach = causal, scale, reach
        self.bias = torch.nn.Parameter(torch.zeros(heads, *(2 * reach - 1,) * axes))
        sizes = Sizes(1, heads, heads, 1, 1, head_dim, head_dim)
        self.register_buffer("projection", orthogonal_gaussian(sizes, features, seed=seed))

    def table(self, grid: Sequence[int]) -> Tensor:
        """The bias of every offset on a grid of this size."""
        table: Tensor = self.bias
        for axis, n in enumerate(grid):
            offset = torch.arange(1 - n, n, device=table.device).clamp(1 - self.reach, self.reach - 1) + self.reach - 1
            table = table.index_select(axis + 1, offset)
        return table

    @takes(q="batch heads length head_dim", k="batch heads length head_dim", v="batch heads length values")
    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        phi_q, phi_k = normalised_features(q, k, self.projection, self.scale)
        return kernel_attention_rpe(phi_q, phi_k, v, self.table((v.shape[-2],) if grid is None else grid), self.causal, grid)
