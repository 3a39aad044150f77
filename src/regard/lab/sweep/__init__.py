"""Pretrained models that read less: training-free sparse mechanisms against density, and policies of the cache against kept bytes, beside controls."""

from .cache import CacheConfig, CachePoint, CacheSweep, cache_sweep
from .cache_report import cache_line, cache_table, write_cache
from .measure import Config, Point, Sweep, sweep
from .methods import DEFAULT, method, oracle, random_blocks
from .policies import DEFAULT_POLICIES, chosen_policies, policy
from .reader import Bytes, Tokens, model_and_reader
from .report import table, write, write_points

__all__ = [
    "DEFAULT",
    "DEFAULT_POLICIES",
    "Bytes",
    "CacheConfig",
    "CachePoint",
    "CacheSweep",
    "Config",
    "Point",
    "Sweep",
    "Tokens",
    "cache_line",
    "cache_sweep",
    "cache_table",
    "chosen_policies",
    "method",
    "model_and_reader",
    "oracle",
    "policy",
    "random_blocks",
    "sweep",
    "table",
    "write",
    "write_cache",
    "write_points",
]
