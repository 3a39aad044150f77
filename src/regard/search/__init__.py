"""Search for the best mix of attention mechanisms: a space, a weight-sharing super-net, a ranker, an evolution under a budget. And `cross_entropy` for any hyper-parameters."""

from typing import Any

from ..lazy import listed, load
from .cross_entropy import Choice, Normal, cross_entropy
from .ranker import PairwiseRanker
from .space import Arch, LayerArch, Space, flops
from .supernet import SuperNet

# Rows of the zoo under their public names, each loaded when it is first asked for.
ROWS = {
    "SearchResult": "sparse.attention_nas",
    "attention_search": "sparse.attention_nas",
    "evolve": "sparse.attention_nas",
}

__all__ = ["Arch", "Choice", "LayerArch", "Normal", "PairwiseRanker", "Space", "SuperNet", "cross_entropy", "flops", *ROWS]


def __getattr__(name: str) -> Any:
    return load(__name__, ROWS, name)


def __dir__() -> list[str]:
    return listed(globals(), ROWS)
