"""The recurrent executor: one description, three executions (parallel, chunked, step) that give the same numbers."""

from .pose import Scan, pose
from .run import run

__all__ = ["Scan", "pose", "run"]
