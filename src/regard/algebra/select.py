"""Selectors: look at q and k, say which key blocks each query (or block of queries) may read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RegardError
from .mask import positive
from .part import Function, Part, Sizes, call, described


@dataclass(frozen=True, eq=False)
class Selection:
    """keep (B, H, ceil(Lq / block_q), ceil(Lk / block_k)), bool: which key blocks a block of queries reads.

    Blocks of queries are counted in absolute positions from the first query; the mask still applies inside what is kept.
    """

    keep: Tensor
    block_q: int
    block_k: int

    @property
    def density(self) -> float:
        """Share of blocks kept."""
        return float(self.keep.float().mean())

    def checked(self, sizes: Sizes) -> Selection:
        """Itself for all batch rows and heads of a call; RegardError where its blocks do not fit the call."""
        if not isinstance(self.block_q, int) or not isinstance(self.block_k, int) or min(self.block_q, self.block_k) < 1:
            raise RegardError(f"a selection with block_q={self.block_q!r}, block_k={self.block_k!r}; expected positive integers")
        shape = (sizes.batch, sizes.heads, -(-sizes.q_len // self.block_q), -(-sizes.k_len // self.block_k))
        keep = self.keep
        fits = keep.dim() == 4 and all(have in (1, want) for have, want in zip(keep.shape[:2], shape, strict=False))
        if not fits or tuple(keep.shape[2:]) != shape[2:] or keep.dtype != torch.bool:
            raise RegardError(
                f"a selection's keep is a {keep.dtype} tensor of shape {tuple(keep.shape)}; expected bool, {shape} for blocks of "
                f"{self.block_q} queries and {self.block_k} keys, where batch and heads may be 1"
            )
        return self if tuple(keep.shape) == shape else Selection(keep.expand(shape), self.block_q, self.block_k)


@dataclass(frozen=True, eq=False)
class View:
    """What a selector may look at beside q and k.

    first: the absolute position of the first query. visible: absolute positions of queries (n,) -> what the mask shows them,
    (B or 1, H or 1, n, Lk). blocks: (block_q, block_k) -> (some pair visible, every pair visible), each (B or 1, H or 1, nq, nk).
    inputs: the tensors that the mechanism declares.
    """

    first: int
    visible: Callable[[Tensor], Tensor]
    blocks: Callable[[int, int], tuple[Tensor, Tensor]]
    inputs: Mapping[str, Any]


@described
class Selector(Part):
    """`select(q, k, view)` -> Selection (None: everything), without gradient, from q and k as they are scored (q times scale)."""

    def select(self, q: Tensor, k: Tensor, view: View) -> Selection | None:
        raise NotImplementedError

    def flops(self, sizes: Sizes) -> int | None:
        """What the choice itself costs, about; None: not known."""
        return None

    @property
    def looks_ahead(self) -> bool:
        """Whether the choice for a query may depend on later queries; what is read never does."""
        return False

    @property
    def alone(self) -> bool:
        """Whether the choice counts from the first token of a sequence, so that each row of a padded batch and each packed document chooses
        by itself. Otherwise the choice is made over the whole rows, and the mask hides pairs of what was chosen."""
        return False


def scoring(sizes: Sizes, rows: float, columns: float) -> int:
    """FLOP of scoring so many rows against so many columns in every head."""
    return int(2 * sizes.batch * sizes.heads * rows * columns * sizes.head_dim)


@described
class TopBlocks(Selector):
    """Each query reads the `top_k` key blocks of best q.mean(k), its own block always among them, past complete blocks only (MoBA)."""

    block_size: int = 512
    top_k: int = 3

    def __post_init__(self) -> None:
        positive(self, "block_size", "top_k")

    def select(self, q: Tensor, k: Tensor, view: View) -> Selection:
        size, heads, first = self.block_size, q.shape[1], view.first
        k_len = k.shape[-2]
        complete = k_len // size
        count = -(-k_len // size)
        # Only complete blocks have a mean: an incomplete one can only be the query's own, which is kept anyway.
        means = k[..., : complete * size, :].unflatten(-2, (complete, size)).mean(-2, dtype=torch.promote_types(k.dtype, torch.float32))
        means = means.repeat_interleave(heads // k.shape[1], 1)
        gate = q.to(means.dtype) @ means.transpose(-1, -2)
        if complete < count:
            gate = torch.nn.functional.pad(gate, (0, count - complete), value=0.0)
        own = torch.arange(first, first + q.shape[-2], device=q.device)[:, None] // size
        block = torch.arange(count, device=q.device)
        gate += torch.where(block >= own, float("-inf"), 0.0).to(gate.dtype)  # complete blocks of the past
        keep = (block == own).expand(gate.shape).clone()
        past = min(self.top_k, count) - 1
        if past > 8:
            best = gate.topk(past, -1)
            return Selection(keep.scatter_(-1, best.indices, keep.gather(-1, best.indices) | (best.values > float("-inf"))), 1, size)
        for _ in range(past):  # a few maxima are found faster than topk finds them
            value, index = gate.max(-1, keepdim=True)
            keep.scatter_(-1, index, keep.gather(-1, index) | (value > float("-inf")))
            gate.scatter_(-1, index, float("-inf"))
        return Selection(keep, 1, size)

    def flops(self, sizes: Sizes) -> int:
        return scoring(sizes, sizes.q_len, sizes.k_len / self.block_size)

    @property
    def alone(self) -> bool:
        return True


@described
class Chosen(Selector):
    """A plain function as selector: `function(q, k, view) -> Selection`, and by name tensors that the mechanism declares.

    ahead: it looks at later queries to choose, so it cannot run token by token. decode: whether a single query is chosen for as well
    (else it reads everything). cost: a plain function (sizes) -> about how many FLOP the choice takes. by_sequence: rows of a padded batch and
    packed documents choose each by itself; else `function` sees whole rows, and `view` what the mask hides.
    """

    function: Function = lambda q, k, view: None  # replaced by the user's
    ahead: bool = False
    decode: bool = True
    cost: Function | None = None
    by_sequence: bool = False

    def flops(self, sizes: Sizes) -> int | None:
        return None if self.cost is None else 0 if not self.decode and sizes.q_len == 1 else int(self.cost(sizes))

    def select(self, q: Tensor, k: Tensor, view: View) -> Any:
        if not self.decode and q.shape[-2] == 1:
            return None
        return call(self.function, q, k, view, env=view.inputs)

    @property
    def looks_ahead(self) -> bool:
        return self.ahead

    @property
    def alone(self) -> bool:
        return self.by_sequence
