"""Attention over several processes. Every function also runs in one process with virtual ranks."""

from .lasp import lasp_plus, lightning_packed

__all__ = ["lasp_plus", "lightning_packed"]
