"""ReLU attention with a variance factor, and feed-forward layers as memories (id 94; Shen et al., 2023).

p_ij = relu(s_ij) / (gamma_h sqrt(n_i / 2))        Var(sum_j relu(x_j) v_j) = n / 2 for independent standard normal x and v

`memory_sweep` trains memories of more and more slots, `length_sweep` measures what rows sum up to as sequences grow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.algebra import Input, Learned, RowLocal, Weighted
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.tasks.training import fit


def root_half_visible(total: Tensor, n: Tensor, gamma: Tensor) -> Tensor:
    return gamma * (n.clamp_min(1) / 2).sqrt()


@register("reluformer")
def reluformer() -> Weighted:
    """The input `gamma` (H,) is learned as exp(g) from 1."""
    inputs = (Input("gamma", "h", default=1.0, layer=Learned(0.0, torch.exp)),)
    return Weighted(normalizer=RowLocal(torch.relu, divide=root_half_visible, inputs=inputs))


def row_mass_loss(weights: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean |log sum_j p_ij| over rows of weights (..., Lq, Lk): 0 when every row sums to one. Empty rows are left out."""
    mass = weights.sum(-1)
    live = mass > eps
    return torch.where(live, torch.where(live, mass, 1.0).log().abs(), 0.0).sum() / live.sum().clamp_min(1)


def entropy_margin_loss(weights: Tensor, margin: float = 0.7, visible: Tensor | None = None) -> Tensor:
    """Mean relu(H(p / sum p) - margin log n) over rows, n the visible keys (None: all); entropy in nats."""
    n = (
        torch.full_like(weights[..., 0], float(weights.shape[-1]))
        if visible is None
        else visible.expand_as(weights).sum(-1).to(weights.dtype)
    )
    p = weights / weights.sum(-1, keepdim=True).clamp_min(1e-8)
    entropy = -torch.special.xlogy(p, p.clamp_min(1e-30)).sum(-1)
    return torch.relu(entropy - margin * n.clamp_min(1).log()).mean()


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


def memory_sweep(
    slots: tuple[int, ...] = (16, 64, 256), activations: tuple[str, ...] = ("relu", "softmax", "softmax_norm"), *, dim: int = 16, pairs: int = 128,
    steps: int = 300, lr: float = 1e-2, seed: int = 0,
) -> dict[str, dict[int, float]]:  # fmt: skip
    """What is left of learning `pairs` random pairs x -> y (both normal, dim channels) by a `KeyValueMemory`: mean |error|^2 over mean |y|^2, by activation
    and number of slots. A softmax over many slots averages them away; ReLU, and LayerNorm behind softmax, do not."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, pairs, dim, generator=generator)
    found: dict[str, dict[int, float]] = {}
    for activation in activations:
        for count in slots:
            torch.manual_seed(seed)
            memory = KeyValueMemory(dim, count, activation)

            def loss(_: object, memory: KeyValueMemory = memory) -> Tensor:
                return (memory(x) - y).square().mean() / y.square().mean()

            found.setdefault(activation, {})[count] = fit(memory, lambda _: None, loss, steps, lr=lr, seed=seed)[-1]
    return found


@torch.no_grad()
def length_sweep(
    lengths: tuple[int, ...] = (16, 64, 256, 1024), *, dim: int = 32, rows: int = 64, seed: int = 0
) -> dict[str, dict[int, float]]:
    """The variance of outputs for independent normal q, k, v by length: of ReLU attention with its factor, of ReLU without it (which grows as n / 2), and of
    softmax (which falls as 1 / n)."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, dict[int, float]] = {"reluformer": {}, "relu": {}, "softmax": {}}
    for n in lengths:
        q = torch.randn(1, 1, rows, dim, generator=generator)
        k, v = torch.randn(2, 1, 1, n, dim, generator=generator)
        plain = Weighted(normalizer=RowLocal(torch.relu))
        for name, mechanism in (("reluformer", reluformer()), ("relu", plain), ("softmax", Weighted())):
            found[name][n] = float(attend(q, k, v, mechanism).var())
    return found
