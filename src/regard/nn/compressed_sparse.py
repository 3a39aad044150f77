"""NSA: compressed, selected and local keys, three branches joined by gates (Yuan et al., 2025); the baseline of ASA.

o = g_cmp softmax(q k_cmp) v_cmp + g_slc (exact attention on the best blocks) + g_win (sliding window), g = sigmoid(W x)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..algebra import Causal, Chosen, Rope, Selection, View, Weighted, Window, bind
from ..algebra.blocks import heads_of
from ..algebra.compressed import best_blocks, group_sum, kernel_probabilities, kernels, shared_units
from ..engine.door import attend
from ..errors import RegardError


def nsa_plan(q: Tensor, k: Tensor, view: View, *, size: int, stride: int, block_size: int, top_k: int) -> Selection | None:
    """The own block and the best past ones by the mass of the compressed keys that reach into them (q times scale)."""
    count = -(-k.shape[-2] // block_size)
    if top_k >= count:
        return None
    p = group_sum(kernel_probabilities(q, kernels(k, size, stride), view.first, size, stride), k.shape[1])
    return best_blocks(shared_units(p, size, stride, block_size, count), view.first, block_size, top_k, q.shape[1])


def compressed_attention(q: Tensor, k: Tensor, v: Tensor, size: int, stride: int) -> Tensor:
    """Softmax over the means of complete windows; zero before the first is complete."""
    p = kernel_probabilities(q * q.shape[-1] ** -0.5, kernels(k, size, stride), k.shape[-2] - q.shape[-2], size, stride)
    return p @ heads_of(kernels(v, size, stride), q.shape[1])


def selected_attention(q: Tensor, k: Tensor, v: Tensor, size: int, stride: int, block_size: int, top_k: int) -> Tensor:
    plan = Chosen(bind(nsa_plan, size=size, stride=stride, block_size=block_size, top_k=top_k))
    return attend(q, k, v, Weighted(mask=Causal(), select=plan))


def check_sizes(size: int, stride: int, block_size: int, top_k: int, window: int) -> None:
    if size % stride or block_size % stride or min(stride, top_k, window) < 1:
        raise RegardError(
            f"size={size}, stride={stride}, block_size={block_size}, top_k={top_k}, window={window}: expected positive numbers, "
            "size and block_size multiples of stride"
        )


class NSAAttention(nn.Module):
    """x (B, L, dim) -> (B, L, dim), causal. size, stride: of the compression windows; block_size, top_k: of the selection; keys and values
    of each branch are its own. `cache_floats(t)`: what decoding keeps after t tokens."""

    def __init__(
        self, dim: int, heads: int, kv_heads: int, *, head_dim: int | None = None, size: int = 32, stride: int = 16,
        block_size: int = 64, top_k: int = 16, window: int = 512,
    ):  # fmt: skip
        super().__init__()
        check_sizes(size, stride, block_size, top_k, window)
        d = head_dim or dim // heads
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, d
        self.size, self.stride, self.block_size, self.top_k, self.window = size, stride, block_size, top_k, window
        self.q = nn.Linear(dim, heads * d, False)
        self.kv = nn.Linear(dim, 3 * 2 * kv_heads * d, False)
        self.gates = nn.Linear(dim, 3 * heads)
        self.out, self.rope = nn.Linear(heads * d, dim, False), Rope()

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The compressed, the selected and the local output, (B, H, L, D) each."""
        at = torch.arange(x.shape[1], device=x.device)
        q = self.rope.rotate(self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2), at)
        kv = self.kv(x).unflatten(-1, (3, 2, self.kv_heads, -1)).permute(2, 3, 0, 4, 1, 5)
        (k1, v1), (k2, v2), (k3, v3) = ((self.rope.rotate(k, at), v) for k, v in kv)
        return (
            compressed_attention(q, k1, v1, self.size, self.stride),
            selected_attention(q, k2, v2, self.size, self.stride, self.block_size, self.top_k),
            attend(q, k3, v3, mask=Causal() & Window(self.window)),
        )

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.sigmoid(self.gates(x)).unflatten(-1, (3, self.heads)).permute(2, 0, 3, 1)[..., None]
        o = sum((g * o for g, o in zip(gates, self.branches(x), strict=True)), torch.zeros((), device=x.device))
        return self.out(o.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def cache_floats(self, length: int) -> int:
        """Compressed and selected keys and values grow, the window's do not."""
        pair = 2 * self.kv_heads * self.head_dim
        windows = max(0, (length - self.size) // self.stride + 1)
        return pair * (length + windows + min(length, self.window))
