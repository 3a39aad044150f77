"""LightNet: an additive recurrence, whose decay is what the keys' exponentials sum to, so that no direction is needed (id 191; Qin et al., 2024).

S_t = sum_{s <= t} e^{f_s - z_t} v_s^T, z_t = log sum_{s <= t} e^{f_s};  o_t = silu(q_t) S_t.   Without a mask: k = softmax of f over all positions
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...algebra import FeatureMap, Input, Learned, Recipe, Recurrent, Sizes, bind, identity
from ...catalog.registry import register


def query(q: Tensor, scaled: bool) -> Tensor:
    return F.silu(q) * (q.shape[-1] ** -0.5 if scaled else 1.0)


def axis_angles(sizes: Sizes, axes: int) -> Tensor:
    """10000^(-2 c / D) for the channels that each axis owns in turn, (H, D, axes)."""
    rates = 10000 ** (-2 / sizes.head_dim * torch.arange(sizes.head_dim, dtype=torch.float64))
    own = torch.arange(sizes.head_dim)[:, None] % axes == torch.arange(axes)
    return (rates[:, None] * own).expand(sizes.heads, -1, -1).clone()


def relative_cosines(x: Tensor, position: Tensor, theta: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[x cos a, x sin a], a = sum_axis theta_axis i_axis: products depend on differences of grid indices alone."""
    at, index = position, []
    for size in reversed(grid):
        index.append(at % size)
        at = at // size
    place = torch.stack(index[::-1], -1).to(torch.float64)  # (L, axes)
    angle = torch.einsum("la,hda->hld", place, theta.to(torch.float64))
    return torch.cat((x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)), -1)


@register("lightnet")
def lightnet(
    grid: tuple[int, ...] = (),
    scaled: bool = True,
    gate_rank: int | None = 128,
    key_dim: int | float | None = None,
    short_conv: int = 0,
    norm_eps: float = 1e-5,
) -> Recurrent:
    """grid: the sizes of the axes that tokens, in row order, stand on; with it q and k carry relative cosines (MD-LRPE), learned input
    `theta` (H, D, axes); a sequence is (a large number,). (): no positions. scaled: D^-1/2 on q, as the released kernel has. k holds
    logits f. Of the layer: gate_rank of the silu gate, key_dim channels of q and k a head (expand_ratio; None: head_dim), short_conv width of
    convolutions without activation (0: none), norm_eps of the RMS norm over all heads together. `regard.nn.LightNet` adds the mixing along axes at the input (MD-TPE)."""
    grid = tuple(grid)
    extra: tuple[Input, ...] = ()
    if grid:
        start = bind(axis_angles, axes=len(grid))
        extra = (Input("theta", "hdf", default=start, layer=Learned(start)),)
    return Recurrent(
        FeatureMap(bind(query, scaled=scaled), identity),
        keys="softmax",
        turn=bind(relative_cosines, grid=grid) if grid else None,
        scaled=False,
        inputs=extra,
        recipe=Recipe(
            short_conv=short_conv, merge_norm="rms", norm_eps=norm_eps, out_gate="silu", gate_rank=gate_rank, rope=False, key_dim=key_dim
        ),
    )
