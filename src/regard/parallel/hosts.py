"""Who holds which part of a sequence: virtual hosts in one process, or the processes of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Hosts(Protocol):
    """count hosts, of which this process holds those in `mine`."""

    count: int
    mine: Sequence[int]

    def gather(self, parts: list[Tensor]) -> list[Tensor]:
        """The part of every host in order, from those of this process; all of one shape."""


class VirtualHosts:
    """All hosts in this process."""

    def __init__(self, count: int):
        self.count = count
        self.mine: Sequence[int] = range(count)

    def gather(self, parts: list[Tensor]) -> list[Tensor]:
        return parts


class ProcessHosts:
    """A host a process of a `torch.distributed` group (None: the default one)."""

    def __init__(self, group: Any = None):
        import torch.distributed as dist

        self.group, self.count = group, dist.get_world_size(group)
        self.mine: Sequence[int] = [dist.get_rank(group)]

    def gather(self, parts: list[Tensor]) -> list[Tensor]:
        import torch.distributed as dist

        mine = parts[0].contiguous()
        found = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(found, mine, group=self.group)
        return found
