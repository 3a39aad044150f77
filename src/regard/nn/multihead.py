"""PyTorch's multi-head attention layer, by any mechanism, with PyTorch's own parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra import Causal, Mask, Mechanism, Padding, Sizes
from ..catalog import get
from ..engine import weights
from ..engine.door import attend
from ..engine.weights import dropped
from ..errors import RegardError
from .inputs import Inputs


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with `mechanism`: its constructor, its call, its parameters and their names; weights load either way.

    mechanism: a name or a description; what it learns besides (sinks, gates, betas) are parameters under `inputs`. Weights are returned
    where the mechanism has a matrix of them; where it has none, pass need_weights=False. Causal mechanisms that run as recurrences need
    is_causal=True. PyTorch's fused encoder layer, which would compute softmax, leaves this layer alone.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        mechanism: str | Mechanism = "softmax",
    ):
        if num_heads < 1 or embed_dim % num_heads:
            raise RegardError(f"embed_dim={embed_dim} is not a multiple of num_heads={num_heads}")
        if not 0 <= dropout < 1:
            raise RegardError(f"dropout={dropout}; expected at least 0 and less than 1")
        super().__init__(embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)
        self.mechanism = get(mechanism) if isinstance(mechanism, str) else mechanism
        self.packed = self._qkv_same_embed_dim
        self._qkv_same_embed_dim = False  # what PyTorch's encoder layer asks before it computes softmax without calling this layer
        sizes = Sizes(1, num_heads, num_heads, 1024, 1024, self.head_dim, self.head_dim)
        self.inputs = Inputs(self.mechanism, sizes, self.kdim).to(device=device, dtype=dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._qkv_same_embed_dim = False

    def projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (N, heads, length, head_dim)."""
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        matrices = self.in_proj_weight.chunk(3) if self.packed else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), matrices, biases, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat((x, b.to(x.dtype).expand(x.shape[0], 1, -1)), 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return tuple(x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # type: ignore[return-value]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query (L, N, E), key (S, N, kdim), value (S, N, vdim), or (N, L, E), ... with batch_first, or without N -> (the same as query, weights).

        key_padding_mask (N, S): True, or -inf, hides a key. attn_mask (L, S) or (N * heads, L, S): True hides a pair, or it is added to the
        scores. is_causal: attn_mask, if there is one, is the causal mask; it needs L = S. weights (N, L, S), or (N, heads, L, S) without
        average_attn_weights, where need_weights. A query that sees nothing gets zeros, not NaN.
        """
        if query.is_nested:
            return self.ragged(query, key, value, key_padding_mask is not None or attn_mask is not None or is_causal), None
        batched = query.dim() == 3
        if query.dim() not in (2, 3) or not key.dim() == value.dim() == query.dim():
            shapes = [tuple(x.shape) for x in (query, key, value)]
            raise RegardError(f"query, key, value have shapes {shapes}; expected three, or two, dimensions each")
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = key_padding_mask if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        wanted = (self.embed_dim, self.kdim, self.vdim)
        if tuple(x.shape[-1] for x in (query, key, value)) != wanted or key.shape[:2] != value.shape[:2] or len(query) != len(key):
            shapes = [tuple(x.shape) for x in (query, key, value)]
            raise RegardError(
                f"query, key, value have shapes {shapes} (batch first); expected widths {wanted}, one batch and one source length"
            )
        q, k, v = self.projected(query, key, value)
        mask, given = self.mask_of(q, k, key.shape[1], key_padding_mask, attn_mask, is_causal)
        if self.inputs.items:
            given = {**self.inputs(key, {"q": q, "k": k, "v": v}), **given}
        options = {"mask": mask, **given}
        rate = self.dropout if self.training else 0.0
        p = None
        if rate and need_weights:
            out, p = dropped(q, k, v, self.mechanism, rate, **options)
        else:
            out = attend(q, k, v, self.mechanism, dropout_p=rate, **options)
            p = weights(q, k, self.mechanism, **options) if need_weights else None
        if need_weights and p is None:
            raise RegardError(f"need_weights=True: {type(self.mechanism).__name__} has no matrix of weights; pass need_weights=False")
        y = self.out_proj(out.transpose(1, 2).flatten(-2))
        if p is not None:
            p = (p.mean(1) if average_attn_weights else p).to(y.dtype)
            p = p if batched else p[0]
        return (y[0] if not batched else y if self.batch_first else y.transpose(0, 1)), p

    def ragged(self, query: Tensor, key: Tensor, value: Tensor, masked: bool) -> Tensor:
        """Self-attention of a nested tensor, which PyTorch's encoder makes of padded sequences."""
        if key is not query or value is not query or masked or not self.batch_first:
            raise RegardError("a nested query: expected self-attention (query, key and value one tensor), batch_first=True and no masks")
        lengths = [len(row) for row in query.unbind()]
        x = query.to_padded_tensor(0.0)
        padding = torch.arange(x.shape[1], device=x.device) >= torch.tensor(lengths, device=x.device)[:, None]
        y = self(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(y, lengths, strict=True)])

    def mask_of(
        self, q: Tensor, k: Tensor, source: int, padding: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> tuple[Mask | Tensor | None, dict[str, Any]]:
        """What `attend` is told: a structure where there is one, else a table. Keys that the layer adds are seen by all."""
        batch, q_len, k_len = q.shape[0], q.shape[2], k.shape[2]
        if padding is not None and (padding.shape != (batch, source) or not (padding.dtype == torch.bool or padding.is_floating_point())):
            raise RegardError(f"key_padding_mask is {padding.dtype} {tuple(padding.shape)}; expected bool or floating, {(batch, source)}")
        if is_causal and q_len != source:
            raise RegardError(f"is_causal=True with {q_len} queries and {source} keys; expected as many, or attn_mask alone")
        if is_causal and k_len == source and (padding is None or padding.dtype == torch.bool):
            if padding is None:
                return Causal(), {}
            return Causal() & Padding(), {"keep": ~padding}
        if is_causal and attn_mask is None:
            attn_mask = torch.ones(q_len, source, dtype=torch.bool, device=q.device).triu(1)
        if attn_mask is None and padding is None:
            return None, {}
        if attn_mask is None and padding is not None and padding.dtype == torch.bool:
            return Padding(), {"keep": F.pad(~padding, (0, k_len - source), value=True)}
        table = None if attn_mask is None else self.of_pairs(attn_mask, batch, q_len, source)
        rows = None if padding is None else padding[:, None, None]
        parts = [x for x in (table, rows) if x is not None]
        if all(x.dtype == torch.bool for x in parts):
            seen = ~parts[0] if len(parts) == 1 else ~(parts[0] | parts[1])
            return F.pad(seen.expand(-1, -1, q_len, -1), (0, k_len - source), value=True), {}
        added = [
            torch.zeros(x.shape, dtype=q.dtype, device=q.device).masked_fill(x, -torch.inf) if x.dtype == torch.bool else x for x in parts
        ]
        total = added[0] if len(added) == 1 else added[0] + added[1]
        return F.pad(total.to(q.dtype).expand(-1, -1, q_len, -1), (0, k_len - source)), {}

    def of_pairs(self, mask: Tensor, batch: int, q_len: int, source: int) -> Tensor:
        """(1 or N, 1 or heads, L, S)."""
        if not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise RegardError(f"attn_mask is {mask.dtype}; expected bool (True hides) or floating (added to the scores)")
        if mask.shape == (q_len, source):
            return mask[None, None]
        if mask.shape == (batch * self.num_heads, q_len, source):
            return mask.unflatten(0, (batch, self.num_heads))
        raise RegardError(
            f"attn_mask has shape {tuple(mask.shape)}; expected {(q_len, source)} or {(batch * self.num_heads, q_len, source)}"
        )
