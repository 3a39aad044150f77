"""Tokens in the order that suits their mask: a grid's windows lie in far fewer blocks when its tokens come tile by tile."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..algebra.mask import Mask
from ..algebra.mechanism import Weighted
from ..algebra.normalizer import RowLocal
from ..algebra.part import Sizes, asks
from ..algebra.permute import Permutation
from .problem import Problem, functions_of
from .reference import Stats

BLOCKS = 64, 32  # queries and keys of a block: a tile, and half of one, which fits windows closer


def arrangement(mechanism: Weighted, mask: Mask, sizes: Sizes) -> tuple[Mask, Tensor] | None:
    """The mask's own order of the keys, and the mask in it; None where something else reads places, or the order is good."""
    if mechanism.select is not None or not isinstance(mechanism.normalizer, RowLocal):
        return None
    if any({"i", "j"} & set(asks(function, lead)) for function, lead in functions_of(mechanism)):
        return None
    if not all(item.elementwise for item in mechanism.declared):
        return None
    return mask.arranged(sizes)


def run(problem: Problem, executor: Callable[[Problem], tuple[Tensor, Stats]]) -> tuple[Tensor, Stats]:
    """The executor's answer, its problem put in the mask's order and the answer back in the call's."""
    found = arrangement(problem.mechanism, problem.mask, problem.sizes)
    if found is None:
        return executor(problem)
    mask, places = found
    keys = Permutation(places.to(problem.q.device))
    queries = Permutation(keys.order[: problem.sizes.q_len])

    def moved(x: Tensor) -> Tensor:
        for dim, order in ((2, queries.order), (3, keys.order)):
            x = x.index_select(dim, order) if x.dim() == 4 and x.shape[dim] > 1 else x
        return x

    inputs = {name: moved(x) for name, x in problem.inputs.items()}
    counts = None if problem.counts is None else moved(problem.counts)
    q, k, v = queries.apply(problem.q), keys.apply(problem.k), keys.apply(problem.v)
    out, stats = executor(problem.with_(mask=mask, q=q, k=k, v=v, inputs=inputs, counts=counts, blocks=BLOCKS))
    return queries.invert(out), Stats(*[queries.invert(x) for x in stats])
