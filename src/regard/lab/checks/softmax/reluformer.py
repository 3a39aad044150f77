"""Checks of reluformer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from regard.algebra import Causal
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.zoo.softmax.reluformer import KeyValueMemory, entropy_margin_loss, row_mass_loss


@check("reluformer", "Linear-ReLU-Linear == the memory with copied weights", below=1e-12, control="the softmax memory")
def _() -> tuple[float, float]:
    up, down = torch.nn.Linear(16, 64).double(), torch.nn.Linear(64, 16).double()
    x = torch.randn(2, 9, 16, dtype=F64)
    truth = down(torch.relu(up(x)))

    def gap(activation: str) -> float:
        memory = KeyValueMemory(16, 64, activation).double()
        memory.load_state_dict({"keys": up.weight, "key_bias": up.bias, "values": down.weight.T, "value_bias": down.bias}, strict=False)
        return naive.gap(memory(x), truth)

    return gap("relu"), gap("softmax")


@check("reluformer", "N(0, 1) logits and values: largest |output variance - 1| over n = 32, 256, 2048", below=0.06, control="division by n")
def _() -> tuple[float, float]:
    def off(name: str) -> float:
        gaps = []
        for n in (32, 256, 2048):
            s, v = torch.randn(1, 1, 2048, n, dtype=F64), torch.randn(1, 1, n, 256, dtype=F64)
            gaps.append(abs(float(attend(s, torch.eye(n, dtype=F64)[None, None], v, name, scale=1.0).var()) - 1))
        return max(gaps)

    return off("reluformer"), off("relu")


@check("reluformer", "causal == relu(s) / (gamma_h sqrt(i / 2)) in loops", below=1e-12, control="the whole length in place of i")
def _() -> tuple[float, float]:
    q, k, v = qkv(29)
    gamma = torch.tensor([0.7, 1.6], dtype=F64)
    out = attend(q, k, v, "reluformer", mask=Causal(), gamma=gamma)
    truth = naive.attention(q, k, v, lambda s: s.clamp_min(0) / math.sqrt(len(s) / 2), naive.causal)
    other = naive.attention(q, k, v, lambda s: s.clamp_min(0) / math.sqrt(29 / 2), naive.causal)
    return tuple(naive.gap(out, x / gamma[:, None, None]) for x in (truth, other))  # type: ignore[return-value]


@check(
    "reluformer", "regularisers are 0 for rows that sum to one with entropy below the margin", below=1e-12, control="flat rows of mass 2"
)
def _() -> tuple[float, float]:
    good = F.one_hot(torch.randint(16, (4, 16)), 16).double()
    flat = torch.full((4, 16, 16), 2 / 16, dtype=F64)
    return tuple(float(row_mass_loss(w) + entropy_margin_loss(w)) for w in (good, flat))  # type: ignore[return-value]
