"""SLA: critical blocks by softmax, the rest by linear attention through one learned map (Zhang et al., 2025).

o = softmax over critical blocks + W_l [phi(Q_u) H_u / (phi(Q_u) Z_u)] + b_l, H_u, Z_u sums of phi(K_w)^T V_w over marginal blocks w
In a diffusion transformer: swap_sla(model), then finetune_sla(model, patch, draw, loss).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Chosen, Input, Selection, View, Weighted
from regard.algebra.blocks import cut, lengths, pooled
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.parts import takes

if TYPE_CHECKING:
    from regard.adapt.intercept import LayerPatch

FEATURES = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: F.elu(x) + 1, "relu": F.relu}


def given_blocks(q: Tensor, k: Tensor, view: View, keep: Tensor, size: Tensor) -> Selection:
    return Selection(keep, int(size), int(size))


BLOCKS = Weighted(select=Chosen(given_blocks), inputs=(Input("keep", "bhff", dtype="bool"), Input("size", "", dtype="int")))


@torch.no_grad()
def block_classes(q: Tensor, k: Tensor, block_size: int, top: float, bottom: float) -> tuple[Tensor, Tensor]:
    """(critical, marginal), (B, H, nq, nk) bool: the best `top` share of each row of pooled scores (one block at least unless top is 0),
    and what is neither that nor in the lowest `bottom` share."""
    p = (pooled(q, block_size) @ pooled(k - k.mean(-2, keepdim=True), block_size).transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    count = p.shape[-1]
    rank = p.argsort(-1, descending=True).argsort(-1)
    critical = rank < (max(1, int(top * count)) if top > 0 else 0)
    return critical, ~critical & (rank < count - int(bottom * count))


def marginal_linear(q: Tensor, k: Tensor, v: Tensor, marginal: Tensor, block_size: int) -> Tensor:
    """Linear attention of features q, k over each query block's marginal key blocks; rows without any are zero."""
    real = (torch.arange(block_size, device=k.device) < lengths(k.shape[-2], block_size, k.device)[:, None])[..., None]
    keys, values = cut(k, block_size) * real, cut(v, block_size)
    # Per-block states once; a row's sum is the total less the few blocks that are not marginal.
    states = keys.transpose(-1, -2) @ torch.cat((values, torch.ones_like(values[..., :1])), -1)
    rest = (~marginal).to(states.dtype)
    sums = states.sum(2, keepdim=True) - (rest @ states.flatten(-2)).unflatten(-1, states.shape[-2:])
    sums = sums * marginal.any(-1)[..., None, None]
    o = cut(q, block_size) @ sums
    mass = o[..., -1:]
    some = marginal.any(-1)[..., None, None] & (mass > 0)
    out = torch.where(some, o[..., :-1] / torch.where(some, mass, 1.0), 0.0)
    return out.flatten(-3, -2)[..., : q.shape[-2], :]


@register("sla", kind="module")
class SparseLinearAttention(nn.Module):
    """q, k, v (B, H, L, D) -> (B, H, L, D), bidirectional and trainable; one D x D map, shared by the heads, starts at zero.

    top: share of critical blocks; bottom: share of negligible ones (the released code has none). over: "marginal" (the paper: linear part
    over what is neither) or "all" (over all tokens, as the released main branch, with 1e-5 added to its mass). feature: "softmax" over channels, "elu" or "relu".
    """

    def __init__(
        self,
        head_dim: int,
        top: float = 0.05,
        bottom: float = 0.1,
        *,
        block_size: int = 64,
        feature: str = "softmax",
        over: str = "marginal",
    ):
        super().__init__()
        self.head_dim = head_dim
        if feature not in FEATURES or over not in ("marginal", "all"):
            raise RegardError(f"feature={feature!r}, over={over!r}; expected one of {', '.join(FEATURES)}, and marginal or all")
        self.top, self.bottom, self.block_size, self.feature, self.over = top, bottom, block_size, feature, over
        self.linear = nn.Linear(head_dim, head_dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def branches(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(sparse, linear) outputs before they are joined."""
        critical, marginal = block_classes(q, k, self.block_size, self.top, self.bottom)
        sparse = attend(q, k, v, BLOCKS, keep=critical, size=self.block_size) if self.top > 0 else torch.zeros_like(v)
        phi_q, phi_k = (FEATURES[self.feature](x) for x in (q, k))
        if self.over == "all":
            return sparse, phi_q @ (phi_k.transpose(-1, -2) @ v) / (phi_q @ phi_k.sum(-2)[..., None] + 1e-5)
        return sparse, marginal_linear(phi_q, phi_k, v, marginal, self.block_size)

    @takes(q="batch heads queries head_dim", k="batch heads length head_dim", v="batch heads length head_dim")
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sparse, linear = self.branches(q, k, v)
        return sparse + self.linear(linear)  # type: ignore[no-any-return]


def swap_sla(model: nn.Module, layers: Iterable[int] | None = None, **options: Any) -> LayerPatch:
    """The layer in the attention of a diffusion transformer (or another model of diffusers or timm), until `.restore()`; patch.layers are the
    `SparseLinearAttention`s, which begin as sparse attention alone. layers: numbers of attention layers (None: all). options: of the layer."""
    from regard.adapt.intercept import patch_layers  # which brings the hosts

    return patch_layers(model, lambda heads, width: SparseLinearAttention(width, **options), layers)


def finetune_sla(
    model: nn.Module,
    patch: LayerPatch,
    draw: Callable[[int], Any],
    loss: Callable[[nn.Module, Any], Tensor],
    steps: int = 2000,
    lr: float = 1e-4,
    whole: bool = True,
) -> list[float]:
    """Steps of AdamW (no decay) on loss(model, draw(step)), such as the model's own of diffusion, for the patch's maps and, with whole, the model too,
    as in the paper. Returns the loss of every step."""
    if steps < 1:
        raise RegardError(f"steps={steps}; expected at least 1")
    learned = [*patch.layers.parameters(), *(model.parameters() if whole else ())]
    optimizer, losses = torch.optim.AdamW(learned, lr, weight_decay=0.0), []
    for step in range(steps):
        value = loss(model, draw(step))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses
