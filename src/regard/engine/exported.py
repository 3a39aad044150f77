"""Questions about numbers, which an exported program cannot ask: it must hold for other numbers as well."""

from __future__ import annotations

import torch
from torch import Tensor


def holds(condition: Tensor, unknown: bool) -> bool:
    """Whether all of a bool tensor is true; `unknown` while torch.export records."""
    return unknown if torch.compiler.is_exporting() else bool(condition.all())
