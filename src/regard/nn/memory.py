"""Feed-forward layers seen as memories of keys and values (Shen et al., 2023; id 94)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import RegardError


class KeyValueMemory(nn.Module):
    """act(x K^T + b_1) V + b_2 over `slots` learned keys and values: x (..., dim) -> (..., dim).

    activation: "relu" (a plain feed-forward layer), "softmax", or "softmax_norm": softmax, then LayerNorm, which gives back the
    variance that averaging over many slots takes.
    """

    def __init__(self, dim: int, slots: int, activation: str = "relu"):
        super().__init__()
        if activation not in ("relu", "softmax", "softmax_norm"):
            raise RegardError(f"activation={activation!r}; expected relu, softmax or softmax_norm")
        self.activation = activation
        self.keys, self.values = nn.Parameter(torch.randn(slots, dim) / dim**0.5), nn.Parameter(torch.randn(slots, dim) / slots**0.5)
        self.key_bias, self.value_bias = nn.Parameter(torch.zeros(slots)), nn.Parameter(torch.zeros(dim))
        self.norm = nn.LayerNorm(dim) if activation == "softmax_norm" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        z = x @ self.keys.T + self.key_bias
        weights = torch.relu(z) if self.activation == "relu" else z.softmax(-1)
        return self.norm(weights @ self.values) + self.value_bias  # type: ignore[no-any-return]
