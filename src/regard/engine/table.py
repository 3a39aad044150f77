"""Small selections as a table of pairs: blocks of a few tokens cost more to go through than the pairs they skip."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..algebra.mechanism import Weighted
from ..algebra.normalizer import SOFTMAX
from ..algebra.part import Sizes
from ..algebra.token_mask import Explicit
from . import sdpa, tiled
from .pairs import indices, visible
from .problem import Problem

HEAD, CALL = 1 << 18, 1 << 23  # pairs of a head, and of a call, that are looked at whole


def refusal(mechanism: Weighted, sizes: Sizes, device: torch.device) -> str:
    """Why the pairs of a selection are not spelled out, or the empty string."""
    if mechanism.select is None:
        return "nothing is selected"
    if device.type != "cpu":
        return "blocks are what a GPU reads"
    pairs = sizes.q_len * sizes.k_len
    return "" if pairs <= HEAD and pairs * sizes.batch * sizes.heads <= CALL else "too many pairs to look at each"


def run(problem: Problem) -> tuple[Tensor, None]:
    """(out, None): by PyTorch's kernel where it is plain softmax, else tile by tile."""
    seen = pairs_of(problem)
    mechanism: Any = problem.mechanism
    if mechanism.normalizer == SOFTMAX and mechanism.score.dot and getattr(mechanism.position, "modify", None) is None:
        q, k = problem.q.to(problem.v.dtype), problem.k.to(problem.v.dtype)
        return sdpa.call(q, k, problem.v, "given", 1.0, seen), None
    of_mask = {item.name for part in problem.mask.parts() for item in getattr(part, "inputs", ())}
    of_mask -= {item.name for item in mechanism.declared}
    inputs = {name: x for name, x in problem.inputs.items() if name not in of_mask}
    return tiled.run(problem.with_(mask=Explicit(), inputs={**inputs, "visible": seen}, selection=None))[0], None


def pairs_of(problem: Problem) -> Tensor:
    """What the mask shows of what was chosen, (B, H, Lq, Lk) bool."""
    selection, sizes = problem.selection, problem.sizes
    assert selection is not None
    at = indices(sizes, problem.q.device)
    around = {**problem.inputs, "offset": problem.offset, "k_len": sizes.k_len}
    seen = visible(problem.mask, at["b"], at["h"], at["i"], at["j"], around)
    chosen = selection.keep
    for dim, size, length in ((-2, selection.block_q, sizes.q_len), (-1, selection.block_k, sizes.k_len)):
        if size > 1:
            chosen = chosen.repeat_interleave(size, dim).narrow(dim, 0, length)
    return chosen & seen
