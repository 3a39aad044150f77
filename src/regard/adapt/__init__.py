"""Changing pretrained models: another mechanism in place of softmax, distilled or calibrated to it; parts of any model replaced."""

import importlib
from importlib.util import find_spec

from ..nn.images.timm_host import operators
from .conversion import Conversion, convert
from .linearise import distil
from .named import register
from .patch import Patch, patch
from .recipe import Report, carry_out
from .recorded import record
from .replace import Replaced, after, replace
from .stages import Distil, Lora, Stage, Transfer, Tune

operators()  # transformers reads torchvision where it is installed
if find_spec("transformers") is not None:
    register()  # attn_implementation="regard:softpick" is known from here on
    importlib.import_module("regard.models.causal_lm")  # and the Auto classes know model_type "regard"

__all__ = [
    "Conversion",
    "Distil",
    "Lora",
    "Patch",
    "Replaced",
    "Report",
    "Stage",
    "Transfer",
    "Tune",
    "after",
    "carry_out",
    "convert",
    "distil",
    "patch",
    "record",
    "replace",
]
