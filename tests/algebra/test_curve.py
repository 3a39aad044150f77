"""The curve visits every cell once, from neighbour to neighbour, and keeps blocks compact."""

import itertools

import pytest
import torch

from regard import RegardError
from regard.algebra.curve import gilbert

EVEN = [(4, 4), (8, 6), (2, 10), (16, 4), (1, 7), (2, 4, 6), (4, 4, 4), (8, 2, 4), (2, 2, 12)]
ODD = [(3, 5), (7, 4), (5, 5), (3, 4, 5), (5, 7, 2)]


def steps(shape):
    order = gilbert(shape).order.tolist()
    sizes = (1, *shape) if len(shape) == 2 else shape
    cells = [(n // (sizes[1] * sizes[2]), n // sizes[2] % sizes[1], n % sizes[2]) for n in order]
    assert sorted(order) == list(range(len(order)))
    return [sum(abs(x - y) for x, y in zip(a, b, strict=True)) for a, b in itertools.pairwise(cells)]


@pytest.mark.parametrize("shape", EVEN, ids=str)
def test_neighbours_follow_one_another(shape):
    assert set(steps(shape)) == {1}


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_odd_sizes_have_single_steps_aside(shape):
    found = steps(shape)
    assert max(found) <= 3 and sum(x > 1 for x in found) <= 4


def test_blocks_are_compact_and_what_follows_stays():
    p = gilbert((8, 8), 3)
    assert p.order[-3:].tolist() == [64, 65, 66]
    block = p.order[:16]
    assert int(block.max() // 8 - block.min() // 8) < 4 and len({int(x) % 8 for x in block}) == 4
    x = torch.randn(2, 67, 3)
    assert torch.equal(p.invert(p.apply(x)), x)
    for shape in ((4,), (0, 2), (1, 2, 3, 4)):
        with pytest.raises(RegardError, match="expected \\(H, W\\)"):
            gilbert(shape)
