"""Checks of localist-recruitment."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.softmax.localist_recruitment import recruit, recruit_experts


def clusters(seed: int, count: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(count, 16, generator=generator, dtype=F64)
    centres = 6 * torch.linalg.qr(centres.T)[0].T[:count]  # unit-variance tokens around centres more than 6 sigma apart
    label = torch.arange(2000) % count
    return centres[label] + torch.randn(2000, 16, generator=generator, dtype=F64), label


@check(
    "localist-recruitment",
    "5 planted clusters, 5 seeds: runs that end at 5 blocks, purity >= 0.95, J falling by the margin at every step",
    above=4.0,
    control="blocks that cost nothing, but pay",
)
def _() -> tuple[float, float]:
    def good(free: bool) -> int:
        runs = 0
        for seed in range(5):
            x, label = clusters(seed)
            found = recruit(x, max_blocks=12, **({"cost": lambda *_: -2000.0} if free else {}))  # type: ignore[arg-type]
            purity = (
                sum(int(torch.bincount(label[found.labels == b]).max()) for b in range(len(found.means)) if bool((found.labels == b).any()))
                / 2000
            )
            lengths = [one.length for one in found.accepted]
            falling = all(b <= a - 8 for a, b in itertools.pairwise(lengths))
            runs += len(found.means) == 5 and purity >= 0.95 and falling
        return runs

    return good(False), good(True)


@check("localist-recruitment", "pure noise: blocks recruited; doubling C(b) recruits no more", below=0.0, control="planted clusters")
def _() -> tuple[float, float]:
    noise = torch.randn(2000, 16, generator=torch.Generator().manual_seed(9), dtype=F64)
    x, _ = clusters(0)
    more = max(0, len(recruit(x, cost_factor=2.0).means) - len(recruit(x).means))
    return len(recruit(noise).means) - 1 + more, len(recruit(x).means) - 1


@check(
    "localist-recruitment",
    "three domains, one of them twice: experts recruited beyond three, and tokens routed wrongly",
    below=0.0,
    control="a free expert for each",
)
def _() -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    tables = [torch.softmax(3 * torch.randn(8, 8, generator=generator), -1) for _ in range(3)]
    features = torch.randn(3, 16, generator=generator)

    def text(table: Tensor) -> Tensor:
        tokens = [0]
        for _ in range(3000):
            tokens.append(int(torch.multinomial(table[tokens[-1]], 1, generator=generator)))
        return torch.tensor(tokens)

    domains = [(features[at], text(tables[at])) for at in (0, 1, 0, 2)]
    own = recruit_experts(domains, 8)
    wrong = int((own.route(features).argmax(-1) != torch.arange(3)).sum())
    return abs(len(own.models) - 3) + wrong, abs(len(recruit_experts(domains, 8, price=-1e9).models) - 3)
