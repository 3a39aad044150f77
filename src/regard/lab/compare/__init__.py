"""`regard compare`: the same small model trained with each mechanism on the same text, then measured, with a report."""

from .config import Config, default_mechanisms
from .run import compare
from .vision import VisionConfig, compare_layers

__all__ = ["Config", "VisionConfig", "compare", "compare_layers", "default_mechanisms"]
