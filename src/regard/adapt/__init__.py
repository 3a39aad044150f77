"""Changing pretrained models: another mechanism in place of softmax, distilled or calibrated to it; parts of any model replaced."""

from .linearise import distil
from .patch import Patch, patch
from .recorded import record
from .replace import Replaced, after, replace

__all__ = ["Patch", "Replaced", "after", "distil", "patch", "record", "replace"]
