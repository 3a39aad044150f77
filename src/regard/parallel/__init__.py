"""Attention over several processes. Every function also runs in one process with virtual ranks."""

from .hosts import Hosts, ProcessHosts, VirtualHosts
from .lasp import lasp_plus, lightning_packed
from .star import StarState, star_decode, star_mask, star_prefill

__all__ = [
    "Hosts",
    "ProcessHosts",
    "StarState",
    "VirtualHosts",
    "lasp_plus",
    "lightning_packed",
    "star_decode",
    "star_mask",
    "star_prefill",
]
