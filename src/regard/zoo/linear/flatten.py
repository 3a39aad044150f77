"""FLatten: focused linear attention, a power that sharpens directions and keeps norms (id 58; Han et al., 2023).

f_p(x) = |x| x^p / |x^p| of x = (relu(x) + 1e-6) / softplus(a),   o_i = f_p(q_i) S / (f_p(q_i).mean f_p(k) + eps) (+ a depthwise convolution of v)
Not built: the swap into Swin, PVT and CSwin models. Focus: `focus_gap`; ranks of weights: `regard.zoo.linear.mamba_rank_analysis.rank_report`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import FeatureMap, Input, Learned, Recipe, Recurrent, Sizes, bind
from regard.algebra.readouts import mean_divided
from regard.catalog.registry import register
from regard.errors import RegardError


def focused(x: Tensor, power: float, dims: tuple[int, ...] = (-1,)) -> Tensor:
    """|x| x^p / |x^p| for x > 0, norms over `dims`."""
    top = x.amax(dims, keepdim=True)  # powers of the largest entry would overflow first
    y = (x / top) ** power
    return y * torch.linalg.vector_norm(x, dim=dims, keepdim=True) / torch.linalg.vector_norm(y, dim=dims, keepdim=True)


def focusing(x: Tensor, sharpness: Tensor, power: float, across: bool) -> Tensor:
    x = (x.relu() + 1e-6) / F.softplus(sharpness)[:, None]
    return focused(x, power, (-3, -1) if across else (-1,))


def flat(sizes: Sizes) -> Tensor:
    return torch.zeros(sizes.heads, sizes.head_dim)


@register("flatten")
def flatten(power: float = 3.0, norm: str = "all", eps: float = 1e-6) -> Recurrent:
    """power: p. norm: "all": over the channels of all heads together, as released; "head": over each head's. Input `sharpness` a (H, D),
    default 0. The module with positions on keys and the convolution: `regard.nn.GridAttention`."""
    if norm not in ("all", "head"):
        raise RegardError(f"norm={norm!r}; expected all or head")
    sharpness = Input("sharpness", "hd", default=flat, layer=Learned(flat))
    return Recurrent(
        FeatureMap(bind(focusing, power=power, across=norm == "all"), inputs=(sharpness,)),
        readout=bind(mean_divided, eps=eps),
        scaled=False,
        recipe=Recipe(rope=False),
    )


def focus_gap(power: float, pairs: int = 2000, dim: int = 16, seed: int = 0) -> float:
    """How much f_p tells directions apart: the mean cosine of random positive pairs (uniform entries) with the same largest channel, minus that of
    the others. It grows with p."""
    x, y = torch.rand(2, pairs, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1e-6
    same = x.argmax(-1) == y.argmax(-1)
    cosine = F.cosine_similarity(focused(x, power), focused(y, power), dim=-1)
    return float(cosine[same].mean() - cosine[~same].mean())
