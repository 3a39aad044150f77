"""Tensors that the processes of a mesh share (DTensors, as FSDP2 makes of parameters), and whole ones."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shared(x: Tensor) -> TypeGuard[DTensor]:
    """Whether several processes hold a part of x each. Nobody has made such a tensor unless its module is loaded, which takes a while."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def gathered(x: Tensor) -> Tensor:
    """All of x, in every process."""
    return x.full_tensor() if shared(x) else x


def spread(whole: Tensor, model: Tensor, source: int | None = 0) -> Tensor:
    """A whole tensor, shared as `model` is. source: the process whose tensor counts (None: all have the same, and nothing is sent)."""
    if not shared(model):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, model.device_mesh, model.placements, src_data_rank=source)
