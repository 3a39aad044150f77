"""What is drawn by a seed or a generator of its own reads no other random numbers, and takes none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from regard.zoo.analysis.deceptive_attention import translation
from regard.zoo.linear.lln_attention import fit
from regard.zoo.linear.mamba_rank_analysis import shapes
from regard.zoo.systems.wgqa import WeightedHeads

DRAWS: dict[str, Callable[[int], Any]] = {
    "mamba-rank-analysis": lambda seed: shapes(50, 12, seed),
    "lln-attention": lambda seed: torch.tensor(fit(4, 8, seed)),
    "deceptive-attention": lambda seed: translation("flip", 5, 4, 9, torch.Generator().manual_seed(seed)),
    "wgqa": lambda seed: WeightedHeads(LINEAR, 4, 2, "row", "random", generator=torch.Generator().manual_seed(seed)).mix,
}
LINEAR = torch.nn.Linear(3, 8)


@pytest.mark.parametrize("slug", DRAWS)
def test_a_seed_tells_all(slug: str) -> None:
    found = []
    for outer in (1, 2):
        torch.manual_seed(outer)
        before = torch.get_rng_state()
        found.append(DRAWS[slug](0))
        assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(*found, strict=True) if isinstance(found[0], tuple) else [found]
    assert all(torch.equal(a, b) for a, b in pairs)
    other = DRAWS[slug](3)
    first = found[0][0] if isinstance(other, tuple) else found[0]
    assert not torch.equal(first, other[0] if isinstance(other, tuple) else other)
