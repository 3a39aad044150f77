"""Attention over several processes. Every function also runs in one process with virtual ranks."""

from typing import Any

from ..lazy import listed, load
from .hosts import Counted, Hosts, ProcessHosts, VirtualHosts, shares

# Rows of the zoo under their public names, each loaded when it is first asked for.
ROWS = {
    "lasp_plus": "linear.minimax_01",
    "lightning_packed": "linear.minimax_01",
    "lasp2": "systems.lasp_2",
    "lasp2h_attention": "systems.lasp_2",
    "linformer_ring_attention": "systems.ring_self_attention",
    "ring_self_attention": "systems.ring_self_attention",
    "StarState": "systems.star_attention",
    "star_decode": "systems.star_attention",
    "star_mask": "systems.star_attention",
    "star_prefill": "systems.star_attention",
}

__all__ = ["Counted", "Hosts", "ProcessHosts", "VirtualHosts", "shares", *ROWS]


def __getattr__(name: str) -> Any:
    return load(__name__, ROWS, name)


def __dir__() -> list[str]:
    return listed(globals(), ROWS)
