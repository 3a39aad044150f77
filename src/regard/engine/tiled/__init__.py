"""The tiled executor: pure PyTorch on any device, O(L * tile) memory, forward and recomputing backward."""

from .run import run

__all__ = ["run"]
