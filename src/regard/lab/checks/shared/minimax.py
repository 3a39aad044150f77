"""A small MiniMax."""

from __future__ import annotations

from regard.zoo.linear.minimax_01 import MiniMaxConfig, MiniMaxLike


def small(**options: object) -> MiniMaxLike:
    config = MiniMaxConfig(**{"vocab": 30, "dim": 32, "layers": 4, "heads": 4, "kv_heads": 2, "period": 4, "hidden": 24, **options})  # type: ignore[arg-type]
    return MiniMaxLike(config).double()
