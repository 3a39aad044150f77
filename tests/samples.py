"""A call of every registered mechanism: description, tensors and inputs, made once for all contract tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import regard
from regard.algebra import Learned, Mechanism, Projected, Recurrent, Sizes
from regard.engine.composed import inputs_of

SMALL = {
    "moba": {"block_size": 8, "top_k": 2},
    "sparse-transformer": {"stride": 8, "count": 3},
    "neighborhood": {"kernel": 5},
    "performer": {"features": 16},
    "cosformer": {"horizon": 64.0},
    "agent-attention": {"agents": 5},
    "soft": {"landmarks": 6},
    "routing-transformer": {"clusters": 3},
    "qknorm": {"init": 5.0},
    "neural-attention": {"width": 6},
    "gsa": {"slots": 5},
    "nha": {"slots": 5, "window": 6},
    "local-linear-attention": {"iterations": 40},
    "flexprefill": {"block_size": 8, "min_budget": 8},
    "spargeattn": {"block_q": 8, "block_k": 8},
    "proxyattn": {"block_size": 8, "stride": 4},
    "dhsa": {"budget": 12, "block_size": 8, "local": 4, "chunk": 4},
    "hip": {"mask_k": 16, "block_q": 8, "window": 8},
    "delta-attention": {"stride": 8},
    "pbs-attn": {"block_size": 8, "segment": 16},
    "powerattention": {"block_size": 8, "window_blocks": 1},
    "hyperattention": {"block_size": 8, "samples": 8, "min_length": 16},
    "psa": {"block_size": 8, "sample": 4},
    "draftattention": {"pool": (2, 2)},
    "nabla": {"patch": 2},
    "vmoba": {"tile": (1, 2, 2)},
    "prflash-saq": {"block_size": 4, "c": 1.5, "position": "additive", "unbiased": True},
}


@dataclass
class Call:
    mechanism: Mechanism
    q: Tensor
    k: Tensor
    v: Tensor
    inputs: dict[str, Tensor]

    @property
    def causal(self) -> bool:
        return self.mechanism.can_be_causal or self.mechanism.causal_only

    def to(self, dtype: torch.dtype) -> Call:
        inputs = {n: x.to(dtype) if x.is_floating_point() else x for n, x in self.inputs.items()}
        return Call(self.mechanism, self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), inputs)

    def run(self, **options) -> Tensor:
        return regard.attend(self.q, self.k, self.v, self.mechanism, **{**self.inputs, **options})


def described(name: str) -> Mechanism:
    return regard.get(name, **SMALL.get(name, {}))


def sample(
    name: str,
    q_len: int = 29,
    k_len: int | None = None,
    heads: int = 4,
    kv_heads: int = 4,
    batch: int = 2,
    dim: int = 8,
    value_dim: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Call:
    mechanism = described(name)
    generator = torch.Generator().manual_seed(seed)
    k_len = k_len or q_len

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(batch, heads, q_len, dim), draw(batch, kv_heads, k_len, dim), draw(batch, kv_heads, k_len, value_dim)
    if isinstance(mechanism, Recurrent) and mechanism.write == "delta":
        k = torch.nn.functional.normalize(k, dim=-1)
    sizes = Sizes(batch, heads, kv_heads, q_len, k_len, dim, value_dim)
    inputs = {}
    for item in inputs_of(mechanism):
        free = getattr(item.layer, "channels", None) or 1
        shape = [sizes.letter(c) or free for c in item.shape]
        if isinstance(item.layer, Learned):
            torch.manual_seed(seed)
            value = item.layer.init(sizes) if callable(item.layer.init) else torch.full(shape, float(item.layer.init))
            value = value.double()
            value = value.expand(shape).clone() if value.dim() == 0 and shape else value
        elif isinstance(item.layer, Projected):
            value = draw(*shape[:-1], shape[-1] * item.layer.times) if shape else draw()
        else:
            continue
        inputs[item.name] = item.layer.transform(value) if item.layer.transform is not None else value
    call = Call(mechanism, q, k, v, inputs)
    return call if dtype == torch.float64 else call.to(dtype)


NAMES = regard.names()
CAUSAL = [name for name in NAMES if described(name).can_be_causal or described(name).causal_only]
