"""Who holds which part of a sequence: virtual hosts in one process, or the processes of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import RegardError


class Hosts(Protocol):
    """count hosts, of which this process holds those in `mine`."""

    count: int
    mine: Sequence[int]

    def gather(self, parts: list[Tensor]) -> list[Tensor]:
        """The part of every host in order, from those of this process; all of one shape."""

    def shift(self, parts: list[Tensor]) -> list[Tensor]:
        """Each host gets the part of the one before it, the first that of the last; all of one shape."""

    def collect(self, parts: list[list[Tensor]]) -> list[Tensor]:
        """parts[m][r]: what a host of this process has for host r. Each host gets the sum of what there is for it; all of one shape."""


class VirtualHosts:
    """All hosts in this process."""

    def __init__(self, count: int):
        self.count = count
        self.mine: Sequence[int] = range(count)

    def gather(self, parts: list[Tensor]) -> list[Tensor]:
        return parts

    def shift(self, parts: list[Tensor]) -> list[Tensor]:
        return [parts[-1], *parts[:-1]]

    def collect(self, parts: list[list[Tensor]]) -> list[Tensor]:
        return [torch.stack([own[to] for own in parts]).sum(0) for to in range(self.count)]


class ProcessHosts:
    """A host a process of a `torch.distributed` group (None: the default one)."""

    def __init__(self, group: Any = None):
        import torch.distributed as dist

        chosen: Any = group or dist.group.WORLD
        self.group, self.count = chosen, dist.get_world_size(group)
        self.mine: Sequence[int] = [dist.get_rank(group)]

    def gather(self, parts: list[Tensor]) -> list[Tensor]:
        import torch.distributed as dist

        mine = parts[0].contiguous()
        found = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(found, mine, group=self.group)
        return found

    def shift(self, parts: list[Tensor]) -> list[Tensor]:
        import torch.distributed as dist

        if self.count == 1:
            return parts
        me, mine = self.mine[0], parts[0].contiguous()
        found = torch.empty_like(mine)
        to, of = (dist.get_global_rank(self.group, (me + step) % self.count) for step in (1, -1))
        work = [dist.isend(mine, to, group=self.group), dist.irecv(found, of, group=self.group)]
        for one in work:
            assert one is not None
            one.wait()
        return [found]

    def collect(self, parts: list[list[Tensor]]) -> list[Tensor]:
        import torch.distributed as dist

        mine = [part.contiguous().clone() for part in parts[0]]
        for to, part in enumerate(mine):
            dist.reduce(part, dist.get_global_rank(self.group, to), group=self.group)
        return [mine[self.mine[0]]]


class Counted:
    """Hosts that count what they exchange. sent: numbers that one host has sent, by the name of the exchange; calls: how often."""

    def __init__(self, hosts: Hosts):
        self.hosts, self.count, self.mine = hosts, hosts.count, hosts.mine
        self.sent: dict[str, int] = {}
        self.calls: dict[str, int] = {}

    def add(self, name: str, numbers: int) -> None:
        self.sent[name] = self.sent.get(name, 0) + numbers
        self.calls[name] = self.calls.get(name, 0) + 1

    def gather(self, parts: list[Tensor]) -> list[Tensor]:
        self.add("gather", parts[0].numel())
        return self.hosts.gather(parts)

    def shift(self, parts: list[Tensor]) -> list[Tensor]:
        self.add("shift", parts[0].numel() if self.count > 1 else 0)
        return self.hosts.shift(parts)

    def collect(self, parts: list[list[Tensor]]) -> list[Tensor]:
        self.add("collect", sum(part.numel() for part in parts[0][1:]))
        return self.hosts.collect(parts)


def shares(x: Tensor, count: int, dim: int = 2) -> list[Tensor]:
    """A tensor cut along `dim` into equal parts, one a host."""
    if count < 1 or x.shape[dim] % count:
        raise RegardError(f"{x.shape[dim]} tokens for {count} hosts: expected a multiple; pad, or use fewer hosts")
    return list(x.chunk(count, dim)) if count > 1 else [x]


def alike(name: str, parts: Sequence[Tensor]) -> None:
    if not parts or any(part.shape != parts[0].shape for part in parts):
        raise RegardError(
            f"{name} of shapes {[tuple(part.shape) for part in parts]}: expected one a host of this process, all of one shape"
        )
