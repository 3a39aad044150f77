"""SOFT: softmax-free attention, a Gaussian kernel in Nystrom form with a Newton inverse (id 12; Lu et al., 2022).

o = P A^+ P^T v,   P = exp(-|q_i - l_j|^2 / 2),  A = exp(-|l_i - l_j|^2 / 2),  q, k, landmarks scaled by D^(-1/4)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Nystrom
from regard.catalog import get
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.images.planes import grid_of, sequence_of


@register("soft")
def soft(
    landmarks: int = 49, iterations: int = 20, ridge: float | None = None, symmetric: bool = False, mode: str | None = None
) -> Nystrom:
    """landmarks: tokens q is pooled to when the input `landmarks` (B, H, m, D), scaled as q is, is not given; use q = k as the paper does.

    mode: "newton": A + ridge I inverted by `iterations` steps, ridge 0.01 as released; "exact": A^-1; "symmetric" (or symmetric=True):
    SOFT++'s D^-1/2 A^+ D^-1/2, D = diag(A 1), without ridge, from 2 A / (largest row sum of a sample and head)^2, with the gradient of the
    inverse; "released": the same from one factor over the whole batch, halved until I - a A A is small, with the gradient of the steps.
    """
    mode = ("symmetric" if symmetric else "newton") if mode is None else mode
    if mode not in ("newton", "exact", "symmetric", "released") or (symmetric and mode not in ("symmetric", "released")):
        raise RegardError(f"mode={mode!r}, symmetric={symmetric}; expected newton, exact, symmetric or released")
    ridge = (0.01 if mode == "newton" else 0.0) if ridge is None else ridge
    return Nystrom(landmarks, iterations, ridge, mode in ("symmetric", "released"), mode)


class SoftmaxFreeAttention(nn.Module):
    """SOFT: shared queries and keys, a Gaussian kernel, landmarks by a strided convolution over the grid (Lu et al., 2022).

    ratio: stride of the landmark convolution. mode: how A is inverted, see "soft" ("newton", "symmetric" of SOFT++, "exact"). pool:
    average-pool landmarks instead of the convolution. conv: width of a depthwise convolution on v, added to the output (True: 3). conv_bias:
    of both convolutions; the released ones have none, and one kernel a head for v. Landmarks are made from q D^-1/4 as it stands in the
    kernel.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        shape: tuple[int, int],
        ratio: int = 2,
        iterations: int = 20,
        symmetric: bool = False,
        pool: bool = False,
        conv: bool | int = False,
        mode: str | None = None,
        conv_bias: bool = True,
    ):
        super().__init__()
        head_dim = dim // heads
        self.heads, self.shape, self.ratio = heads, shape, ratio
        self.q, self.v, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.landmark = None if pool else nn.Conv2d(head_dim, head_dim, ratio, ratio, bias=conv_bias)
        self.norm = None if pool else nn.LayerNorm(head_dim)
        width = 3 if conv is True else int(conv)
        self.conv = nn.Conv2d(dim, dim, width, padding=width // 2, groups=dim, bias=conv_bias) if conv else None
        self.mechanism = get("soft", iterations=iterations, symmetric=symmetric, mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        b, n = x.shape[:2]
        if n != self.shape[0] * self.shape[1]:
            raise RegardError(f"x has {n} tokens; expected {self.shape[0]} x {self.shape[1]}")
        q, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), self.v(x)))
        q = q * q.shape[-1] ** -0.25
        plane = grid_of(q, self.shape)
        if self.landmark is None:
            marks = sequence_of(F.avg_pool2d(plane, self.ratio), b)
        else:
            assert self.norm is not None
            marks = F.gelu(self.norm(sequence_of(self.landmark(plane), b)))
        out = attend(q, q, v, self.mechanism, landmarks=marks, scale=1.0).transpose(1, 2).flatten(-2)
        if self.conv is not None:
            local = self.conv(v.transpose(1, 2).flatten(-2).transpose(1, 2).unflatten(-1, self.shape))
            out = out + local.flatten(2).transpose(1, 2)
        return self.out(out)  # type: ignore[no-any-return]
