"""Changing pretrained Hugging Face models: another mechanism in place of softmax, distilled or calibrated to it."""

from .linearise import distil
from .patch import Patch, patch
from .recorded import record

__all__ = ["Patch", "distil", "patch", "record"]
