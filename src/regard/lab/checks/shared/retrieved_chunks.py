"""A small layer of aligned streams."""

from __future__ import annotations

from regard.zoo.sparse.ssa import SSAAttention


def ssa(top_k: int = 2) -> SSAAttention:
    return SSAAttention(32, 4, 2, block_size=8, top_k=top_k).double()
