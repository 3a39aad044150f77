"""MoH: heads are experts, some shared by all tokens, of the rest each token takes a few (id 156; Jin et al., 2024).

MoH(x_t) = sum_i g_i(t) H_t^i W_O^i over heads [shared | routed];   (a_1, a_2) = 2 softmax(x W_h)
shared: g = a_1 hs softmax(x W_s);   routed: g = a_2 k s_i / sum of those kept, s = softmax(x W_r), the k largest kept, else 0
balance loss E^2 mean_i(f_i p_i): f_i the share of tokens that take i, p_i its mean score.   Without parameters: s = softmax(|q_i| / std), g in {0, 1}
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Causal
from regard.catalog.registry import register
from regard.engine import meter
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.parts import Momentary, takes


def chosen(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of scores (..., E) -> (which, 1.0 or 0.0, (..., E), and the balance loss)."""
    mask = torch.zeros_like(scores).scatter(-1, scores.topk(k, -1).indices, 1.0)
    shares, means = (x.flatten(0, -2).mean(0) for x in (mask, scores))
    return mask, scores.shape[-1] ** 2 * (shares * means).mean()


@register("moh", kind="module")
class MoHAttention(Momentary):
    """x (B, N, dim) -> (B, N, dim), every head's output weighed for every token; `aux_loss` is the balance loss of the last call.

    shared: heads that all tokens use, the first ones; routed: how many of the other heads a token uses. If that is 0, all heads are shared.
    qk_norm: LayerNorm of queries and keys. skip=True in evaluation computes the rows of heads that tokens use and no others.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        shared: int = 2,
        routed: int = 2,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        bias: bool = True,
        qk_norm: bool = False,
        causal: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        skip: bool = False,
    ):
        super().__init__()
        if (
            (head_dim is None and dim % heads)
            or not 0 <= shared <= heads
            or not 0 <= routed <= heads - shared
            or (not routed and shared < heads)
        ):
            raise RegardError(
                f"dim={dim}, heads={heads}, shared={shared}, routed={routed}: expected dim a multiple of heads or head_dim=..., "
                "shared + routed <= heads, and routed of at least 1 unless all heads are shared"
            )
        self.dim, self.heads, self.shared, self.routed, self.causal, self.skip = dim, heads, shared, routed, causal, skip
        self.head_dim = head_dim or dim // heads
        width = heads * self.head_dim
        self.qkv, self.out = nn.Linear(dim, 3 * width, qkv_bias), nn.Linear(width, dim, bias)
        self.q_norm, self.k_norm = (nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity() for _ in range(2))
        self.attn_drop, self.drop = attn_drop, nn.Dropout(proj_drop)
        self.route = nn.Linear(dim, heads - shared, False) if routed else None
        self.share = nn.Linear(dim, shared, False) if shared > 1 else None
        self.weigh = nn.Linear(dim, 2, False) if routed and shared else None
        self.aux_loss: Tensor | None = None

    def gates(self, x: Tensor) -> Tensor:
        """(B, N, heads); all ones where all scores are equal and all heads are taken."""
        ones = x.new_ones(*x.shape[:-1], self.shared)
        own = ones if self.share is None else self.share(x).softmax(-1) * self.shared
        if self.route is None:
            self.aux_loss = x.new_zeros(())
            return own
        scores = self.route(x).softmax(-1)
        mask, self.aux_loss = chosen(scores, self.routed)
        kept = scores * mask
        kept = kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).eps) * self.routed
        if self.weigh is None:
            return kept
        a = 2 * self.weigh(x).softmax(-1)
        return torch.cat((a[..., :1] * own, a[..., 1:] * kept), -1)

    @takes(x="batch length dim")
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, gates = self.q_norm(q), self.k_norm(k), self.gates(x)
        if self.skip and not self.training:
            o = self.few(q, k, v, gates)
        else:
            o = attend(q, k, v, "softmax", mask=Causal() if self.causal else None, dropout_p=self.attn_drop if self.training else 0.0)
        o = o.transpose(1, 2) * gates[..., None].to(o.dtype)
        return self.drop(self.out(o.flatten(2)))  # type: ignore[no-any-return]

    def few(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        """(B, heads, N, D): rows of shared heads, and of other heads those of the tokens that take them; zeros elsewhere."""
        mask, s = Causal() if self.causal else None, self.shared
        o = torch.zeros_like(v)
        if s:
            o[:, :s] = attend(q[:, :s], k[:, :s], v[:, :s], "softmax", mask=mask)
        for row, head in ((b, h) for b in range(len(q)) for h in range(s, self.heads)):
            at = gates[row, :, head].nonzero()[:, 0]
            seen = at[:, None] >= torch.arange(k.shape[2], device=k.device) if self.causal else None
            o[row, head, at] = F.scaled_dot_product_attention(q[row, head, at], k[row, head], v[row, head], attn_mask=seen)
            if meter.counting():
                meter.add(len(at) * k.shape[2] if seen is None else int(seen.sum()))
        return o


class MoHRouting:
    """MoH without parameters in a transformers decoder, until `remove()` or the end of a `with`. aux_loss: mean over the layers' last calls."""

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self.losses: dict[int, Tensor] = {}
        self.gates: dict[int, Tensor] = {}

    @property
    def aux_loss(self) -> Tensor:
        return torch.stack([self.losses[at] for at in sorted(self.losses)]).mean()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def __enter__(self) -> MoHRouting:
        return self

    def __exit__(self, *why: object) -> None:
        self.remove()


def convert_moh(model: nn.Module, shared: float = 0.5, routed: float = 0.25) -> MoHRouting:
    """Gate the heads of a pretrained model whose attention layers have q_proj and o_proj (Llama and its like); no weight changes.

    The first int(shared * heads) heads are always on; of the others a token takes int(routed * heads), by the length of its query; gates are
    0 or 1, and learning goes straight through them to softmax(length / its standard deviation over those heads).
    """
    layers: list[Any] = [
        module for module in model.modules() if hasattr(module, "q_proj") and hasattr(module, "o_proj") and hasattr(module, "head_dim")
    ]
    routing = MoHRouting()
    if not layers:
        raise RegardError(f"{type(model).__name__}: expected attention layers with q_proj and o_proj")
    for number, layer in enumerate(layers):
        heads: int = layer.q_proj.weight.shape[0] // layer.head_dim
        s, k = int(shared * heads), int(routed * heads)
        if not 1 <= k <= heads - s or heads - s < 2:
            routing.remove()
            raise RegardError(
                f"shared={shared}, routed={routed} of {heads} heads: expected at least one routed of at least two that are not shared"
            )

        def gate(module: nn.Module, args: Any, q: Tensor, number: int = number, heads: int = heads, s: int = s, k: int = k) -> None:
            size = q.unflatten(-1, (heads, -1))[..., s:, :].norm(dim=-1)
            scores = (size / size.std(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).eps)).softmax(-1)
            mask, routing.losses[number] = chosen(scores, k)
            through = mask + scores - scores.detach()
            routing.gates[number] = torch.cat((torch.ones_like(through[..., :1]).expand(*through.shape[:-1], s), through), -1)

        def weigh(module: nn.Module, args: tuple[Tensor, ...], number: int = number, heads: int = heads) -> tuple[Tensor, ...]:
            o = args[0].unflatten(-1, (heads, -1))
            return ((o * routing.gates[number][..., None].to(o.dtype)).flatten(-2), *args[1:])

        routing.handles += [layer.q_proj.register_forward_hook(gate), layer.o_proj.register_forward_pre_hook(weigh)]
    return routing
