"""Checks of rela."""

from __future__ import annotations

from typing import Any

import torch

from regard.catalog import get
from regard.engine import weights
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.attention import Attention


@check(
    "rela", "the layer == relu(q.k) v, merged, scale * o / rms(o) * sigmoid(gate * o), in loops", below=1e-12, control="without the gate"
)
def _() -> tuple[float, float]:
    def gap(gated: bool) -> float:
        layer = Attention(16, 2, get("rela", gated=gated)).double()
        if gated:
            torch.nn.init.normal_(layer.merge_norm.gate)  # type: ignore[arg-type]
            torch.nn.init.normal_(layer.merge_norm.scale)  # type: ignore[arg-type]
        x = torch.randn(1, 13, 16, dtype=F64)
        q, k, v, _ = layer.heads_of(x, x, 0, None)
        o = naive.attention(q, k, v, lambda s: s.clamp_min(0), naive.causal).transpose(1, 2).flatten(-2)
        y = o / torch.sqrt(o.square().mean(-1, keepdim=True) + 1e-8)
        norm: Any = layer.merge_norm
        y = norm.scale * y / (1 + torch.exp(-norm.gate * o)) if gated else y / 2
        return naive.gap(layer(x), y @ layer.out.weight.T)

    return gap(True), gap(False)


@check("rela", "a query whose logits are all <= 0 gives exactly 0", below=0.0, control="sparsemax")
def _() -> tuple[float, float]:
    q, k, v = torch.rand(1, 1, 5, 8, dtype=F64), -torch.rand(1, 1, 9, 8, dtype=F64), torch.randn(1, 1, 9, 8, dtype=F64)
    return float(attend(q, k, v, "rela").abs().max()), float(attend(q, k, v, "sparsemax").abs().max())


@check("rela", "random weights: distance of the share of zeros from one half", below=0.05, control="softmax")
def _() -> tuple[float, float]:
    q, k, _ = qkv(128)
    found = [weights(q, k, name) for name in ("rela", "softmax")]
    return tuple(abs(float((w == 0).double().mean()) - 0.5) for w in found if w is not None)  # type: ignore[return-value]


@check("rela", "spread of the layer's output at n = 1024 over n = 16", below=1.3, control="without the RMSNorm")
def _() -> tuple[float, float]:
    def ratio(norm: bool) -> float:
        layer = Attention(64, 4, "rela", causal=False)
        layer.merge_norm = layer.merge_norm if norm else torch.nn.Identity()
        return float((layer(torch.randn(1, 1024, 64)).std() / layer(torch.randn(1, 16, 64)).std()).detach())

    return ratio(True), ratio(False)


@check("rela", "keys in two shards: partial sums add up to the whole", below=1e-12, control="softmax")
def _() -> tuple[float, float]:
    return shards("rela"), shards("softmax")


def shards(name: str) -> float:
    q, k, v = qkv()
    parts = attend(q, k[:, :, :15], v[:, :, :15], name) + attend(q, k[:, :, 15:], v[:, :, 15:], name)
    return naive.gap(parts, attend(q, k, v, name))
