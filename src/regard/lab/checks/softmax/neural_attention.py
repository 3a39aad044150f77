"""Checks of neural-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.algebra import Causal, Weighted
from regard.algebra.pairings import Network
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.scores import network, network_score
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.inputs import Inputs


@check(
    "neural-attention",
    "split first layer, in tiles, causal == the network on every pair in loops",
    below=1e-10,
    control="without its first bias",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(23)
    w = network(6, 8)
    truth = naive.attention(q, k, v, naive.softmax, naive.causal, score=lambda a, b: network_score(a, b, w))
    mechanism = get("neural-attention", width=6)
    other = {**w, "b1": torch.zeros(6, dtype=F64)}
    return tuple(naive.gap(attend(q, k, v, mechanism, mask=Causal(), **given), truth) for given in (w, other))  # type: ignore[return-value]


@check(
    "neural-attention",
    "task 'the key nearest to a number', 8 keys: accuracy after <= 1500 steps",
    above=0.95,
    control="the best affine bilinear score",
)
def _() -> tuple[float, float]:
    class Bilinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(2, 2))

        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            one = torch.ones_like
            return torch.cat((q, one(q)), -1) @ self.a @ torch.cat((k, one(k)), -1).transpose(-1, -2)

    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mechanism = Weighted(score=Network(16))
            from regard.algebra import Sizes

            self.inputs = Inputs(self.mechanism, Sizes(1, 1, 1, 1, 8, 1, 1), None)

        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            env = self.inputs()
            score = self.mechanism.score
            return score.pair(*score.prepare(q, k, 1.0, env), env)  # type: ignore[union-attr, no-any-return]

    def accuracy(model: nn.Module) -> float:
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(1500):
            q, k = torch.rand(128, 1, 1), torch.rand(128, 8, 1)
            target = (q - k).abs().argmin(1).squeeze(-1)
            loss = nn.functional.cross_entropy(model(q, k).squeeze(1), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss < 0.05:
                break
        with torch.no_grad():
            q, k = torch.rand(4000, 1, 1), torch.rand(4000, 8, 1)
            return float((model(q, k).squeeze(1).argmax(-1) == (q - k).abs().argmin(1).squeeze(-1)).float().mean())

    return accuracy(Scored()), accuracy(Bilinear())
