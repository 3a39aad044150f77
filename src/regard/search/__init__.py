"""Search for the best mix of attention mechanisms: a space, a weight-sharing super-net, a ranker, an evolution under a budget."""

from .ranker import PairwiseRanker
from .search import SearchResult, attention_search, evolve
from .space import Arch, LayerArch, Space, flops
from .supernet import SuperNet

__all__ = ["Arch", "LayerArch", "PairwiseRanker", "SearchResult", "Space", "SuperNet", "attention_search", "evolve", "flops"]
