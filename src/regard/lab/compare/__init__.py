"""`regard compare`: the same small model trained with each mechanism on the same text, then measured, with a report."""

from .config import Config, default_mechanisms
from .run import compare

__all__ = ["Config", "compare", "default_mechanisms"]
