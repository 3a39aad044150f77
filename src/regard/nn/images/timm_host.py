"""timm and torchvision, asked for when they are used."""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

from ...errors import MissingDependency

UNGUARDED = ("nms", "qnms")  # operators that torchvision's Python part describes whether or not its binary was loaded


@functools.cache
def operators() -> object:
    """Room for torchvision's operators where its binary cannot be loaded (one built for CUDA beside a PyTorch for CPUs): its models,
    and with them timm, need none of them. None where nothing had to be done; else what must be kept alive."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or "torchvision" in sys.modules:
        return None
    for binary in Path(spec.origin).parent.glob("_C*.so"):
        try:
            ctypes.CDLL(str(binary))
        except OSError:
            room = torch.library.Library("torchvision", "FRAGMENT")
            for name in UNGUARDED:
                room.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            return room
    return None


def load(name: str) -> ModuleType:
    """The package "timm" or "torchvision"; MissingDependency without it."""
    operators()
    try:
        return importlib.import_module(name)
    except ImportError as missing:
        raise MissingDependency(f"this part of regard needs {name}: pip install 'regard[vision]'") from missing
