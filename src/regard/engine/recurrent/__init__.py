"""The recurrent executor: one description, three executions (parallel, chunked, step) that give the same numbers."""

from .pose import Carry, Scan, pose
from .run import run

__all__ = ["Carry", "Scan", "pose", "run"]
