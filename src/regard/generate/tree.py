"""Trees of drafted tokens: who descends from whom, how deep, and the shapes that methods fix beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import RegardError

Paths = Sequence[Sequence[int]]


def check_paths(paths: Paths) -> list[tuple[int, ...]]:
    """Paths of ranks by depth, then in their own order; RegardError unless every path's parent is there and none comes twice."""
    found = [tuple(int(rank) for rank in path) for path in paths]
    known = set(found)
    for path in found:
        if not path or min(path) < 0 or (len(path) > 1 and path[:-1] not in known):
            raise RegardError(f"tree: path {list(path)}: expected ranks from 0 on, and the path without its last rank in the tree too")
    if len(known) < len(found):
        raise RegardError("tree: a path comes twice; expected each once")
    return sorted(found, key=len)


@dataclass(frozen=True)
class Shape:
    """A tree fixed beforehand. paths: of each node but the root, the ranks on its way; [0, 2] is the third guess after the first."""

    paths: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(paths: Paths) -> Shape:
        return Shape(tuple(check_paths(paths)))

    @staticmethod
    def read(text: str) -> Shape:
        """Paths of ranks below ten, a digit a rank: "0 1 00 01"."""
        return Shape.of([[int(rank) for rank in path] for path in text.split()])

    @cached_property
    def parents(self) -> Tensor:
        """(n + 1,): the number of each node's parent; node 0 is the root and its own."""
        number = {path: at + 1 for at, path in enumerate(self.paths)}
        return torch.tensor([0] + [number[path[:-1]] if len(path) > 1 else 0 for path in self.paths])

    @cached_property
    def ranks(self) -> Tensor:
        """(n + 1,): the last rank of each node's path; 0 for the root."""
        return torch.tensor([0] + [path[-1] for path in self.paths])

    @cached_property
    def levels(self) -> list[tuple[int, int]]:
        """First and one past last number of the nodes of each depth from 1 on."""
        depths = [len(path) for path in self.paths]
        return [(1 + depths.index(d), 1 + depths.index(d) + depths.count(d)) for d in range(1, max(depths, default=0) + 1)]


def best_shape(accuracies: Tensor, nodes: int) -> Shape:
    """The `nodes` paths of the largest products of accuracies (depth, rank), found one after another; of equal ones the first in order."""
    depth, ranks = accuracies.shape
    table = accuracies.tolist()
    found: dict[tuple[int, ...], float] = {(): 1.0}
    open_: dict[tuple[int, ...], float] = {(rank,): table[0][rank] for rank in range(ranks)}
    while open_ and len(found) <= nodes:
        path = min(open_, key=lambda one: (-open_[one], len(one), one))
        found[path] = open_.pop(path)
        if len(path) < depth:
            open_ |= {(*path, rank): found[path] * table[len(path)][rank] for rank in range(ranks)}
    return Shape.of([path for path in found if path])


def within(depth: int, product: int) -> Shape:
    """All paths up to `depth` whose ranks + 1 multiply to `product` at most."""
    found: list[tuple[tuple[int, ...], int]] = [((), 1)]
    for path, size in found:
        if len(path) < depth:
            found += [((*path, rank), size * (rank + 1)) for rank in range(product // size)]
    return Shape.of([path for path, _ in found if path])


def ancestors(parents: Tensor) -> Tensor:
    """parents (B, n), each at most the node's own number and the root's its own -> (B, n, n) bool: [i, j], node j is i or on the way to it."""
    n = parents.shape[-1]
    step = torch.nn.functional.one_hot(parents, n).float() + torch.eye(n, device=parents.device)
    reach = 1
    while reach < n:
        step = (step @ step).clamp_max(1)
        reach *= 2
    return step > 0


@dataclass
class Draft:
    """Guesses of what comes next, as a tree whose root is the last token so far, not yet read by the model.

    tokens (B, n): node 0 is the root. parents (B or 1, n): numbers of nodes' parents, smaller than their own (the root's is 0).
    live (B, n) bool: nodes that are there (None: all). odds (B, n, V): probabilities from which the children of each node were drawn,
    independently; None where guesses were not drawn.
    """

    tokens: Tensor
    parents: Tensor
    live: Tensor | None = None
    odds: Tensor | None = None

    @cached_property
    def ancestors(self) -> Tensor:
        """(B or 1, n, n)."""
        return ancestors(self.parents)

    @cached_property
    def depths(self) -> Tensor:
        """(B or 1, n)."""
        return self.ancestors.sum(-1) - 1

    def path_to(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the nodes from the root to node (B,), padded at the end (B, m), and how many they are (B,)."""
        rows = self.ancestors.expand(len(node), -1, -1)[torch.arange(len(node), device=node.device), node]
        count = rows.sum(-1)
        order = torch.where(rows, torch.arange(rows.shape[-1], device=node.device), rows.shape[-1]).sort(-1).values[:, : int(count.max())]
        return order.clamp_max(rows.shape[-1] - 1), count


def chain(tokens: Tensor, live: Tensor | None = None, odds: Tensor | None = None) -> Draft:
    """A draft without branches: tokens (B, n), the root first."""
    return Draft(tokens, torch.arange(-1, tokens.shape[1] - 1, device=tokens.device).clamp_min(0)[None], live, odds)
