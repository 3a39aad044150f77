"""Token Recycling's tree."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

from regard.zoo.systems.token_recycling import DEFAULT_80


@case("c0", dtypes=(torch.float64,))
def tree(g: Vectors) -> None:
    paths = [tuple(rank for rank in path if rank >= 0) for path in g("out").tolist()]
    assert list(DEFAULT_80.paths) == paths
