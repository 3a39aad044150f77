"""Masks: predicates combine, and blocks agree with the pairs they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regard
from regard import RegardError
from regard.algebra import (
    Causal,
    Columns,
    Dilated,
    FixedBlock,
    Full,
    Neighborhood,
    PerHead,
    Prefix,
    Segments,
    Sinks,
    Sizes,
    Strided,
    Weighted,
    Where,
    Window,
)
from regard.engine.layout import FULL, layout
from regard.engine.pairs import indices, visible_counts

small = st.integers(1, 12)
leaf = st.one_of(
    st.just(Causal()),
    st.just(Full()),
    st.builds(Window, small),
    st.builds(Dilated, small, st.integers(1, 4)),
    st.builds(Strided, small),
    st.builds(FixedBlock, small),
    st.builds(Sinks, small),
    st.builds(Prefix, small),
    st.builds(Columns, st.just(7), st.integers(1, 4), st.integers(0, 3)),
    st.just(Where(lambda b, h, i, j: (i + 2 * j) % 5 != 0)),
)
masks = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner), st.builds(lambda a, b: a | b, inner, inner), st.builds(lambda a: ~a, inner)
    ),
    max_leaves=4,
)


def pairs(mask, sizes, **inputs):
    at = indices(sizes, torch.device("cpu"))
    env = {**inputs, "k_len": sizes.k_len, "offset": sizes.k_len - sizes.q_len}
    return mask.visible(at["b"], at["h"], at["i"], at["j"], env).expand(sizes.batch, sizes.heads, sizes.q_len, sizes.k_len)


@settings(max_examples=120, deadline=None)
@given(
    mask=masks, q_len=st.integers(1, 40), k_len=st.integers(1, 40), block_q=st.sampled_from([3, 8, 16]), block_k=st.sampled_from([4, 8, 32])
)
def test_blocks_never_lie(mask, q_len, k_len, block_q, block_k):
    sizes = Sizes(1, 1, 1, q_len, k_len, 4, 4)
    truth, found = pairs(mask, sizes)[0, 0], layout(mask, sizes, block_q, block_k, {}, torch.device("cpu")).kind[0, 0]
    for a in range(found.shape[0]):
        for b in range(found.shape[1]):
            block = truth[a * block_q : (a + 1) * block_q, b * block_k : (b + 1) * block_k]
            assert found[a, b] or not block.any()
            assert found[a, b] != FULL or block.all()


@settings(max_examples=60, deadline=None)
@given(mask=masks, q_len=st.integers(1, 30), k_len=st.integers(1, 30))
def test_visible_counts(mask, q_len, k_len):
    sizes = Sizes(1, 1, 1, q_len, k_len, 4, 4)
    counted = visible_counts(mask, sizes, {}, torch.device("cpu"))
    assert torch.equal(counted.expand(1, 1, q_len, 1)[..., 0].long(), pairs(mask, sizes).sum(-1))


@pytest.mark.parametrize("mask", [Causal(), Window(5), Strided(3), Dilated(3, 2), FixedBlock(8), Sinks(4)])
def test_simple_masks_know_their_blocks_exactly(mask):
    sizes = Sizes(1, 1, 1, 40, 40, 4, 4)
    truth, found = pairs(mask, sizes)[0, 0], layout(mask, sizes, 8, 8, {}, torch.device("cpu")).kind[0, 0]
    blocks = truth.unflatten(0, (5, 8)).unflatten(-1, (5, 8))
    assert torch.equal(found > 0, blocks.any(3).any(1))
    assert torch.equal(found == FULL, blocks.all(3).all(1))


def test_segments_and_heads():
    sizes = Sizes(2, 4, 4, 10, 10, 4, 4)
    ids = torch.tensor([[0] * 4 + [1] * 6, [0] * 7 + [1] * 3])
    seen = pairs(Causal() & Segments(), sizes, segments=ids)
    assert seen[0, 0, 5, 4] and not seen[0, 0, 5, 3] and seen[1, 0, 5, 3] and not seen[0, 0, 4, 5]
    split = pairs(PerHead((Causal(), Window(2))), sizes)
    assert split[0, 0, 9, 0] and not split[0, 1, 9, 0] and split[0, 2, 9, 0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Window(0),
        lambda: Sinks(-1),
        lambda: Strided(2.5),
        lambda: Columns(7, 5, 3),
        lambda: Neighborhood((4, 4), 5),
        lambda: Neighborhood((8,), 3, stride=4),
    ],
)
def test_bad_masks(make):
    with pytest.raises(RegardError, match="expected"):
        make()


def test_masks_compare_and_print():
    import regard

    mask = Causal() & (Window(5) | Sinks(2)) & ~Strided(3)
    assert eval(repr(mask), {"regard": regard}) == mask and hash(mask) == hash(Causal() & (Window(5) | Sinks(2)) & ~Strided(3))
    assert (Full() & Causal()) == Causal() and mask.causal and not (Causal() | Sinks(2)).causal


GRIDS = [
    Neighborhood((12, 10), (5, 3)),
    Neighborhood((12, 10), (5, 3), 1, (2, 3), (False, True), 3),
    Neighborhood((6, 5, 7), 3, (2, 1, 3)),
    Neighborhood((70,), 9, 2, 4, False, 2),
]


@pytest.mark.parametrize("mask", GRIDS)
def test_a_grid_laid_out_tile_by_tile_gives_the_same_answer(mask):
    k_len = mask.total + mask.extra
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (mask.total, k_len, k_len))
    sizes = Sizes(1, 2, 2, mask.total, k_len, 8, 8)
    assert mask.arranged(sizes) is not None
    outs = {}
    for executor in ("reference", "tiled"):
        out = regard.attend(q, k, v, Weighted(mask=mask), executor=executor)
        outs[executor] = [out, *torch.autograd.grad(out.square().sum(), [q, k, v])]
    for a, b in zip(outs["reference"], outs["tiled"], strict=True):
        assert torch.allclose(a, b, atol=1e-10)
    narrow = [x.float() for x in (q, k, v)]
    assert torch.allclose(regard.attend(*narrow, Weighted(mask=mask), executor="native").double(), outs["reference"][0], atol=1e-5)


@pytest.mark.parametrize("mask", GRIDS)
@pytest.mark.parametrize("blocks", [(16, 8), (8, 32)])
def test_blocks_of_grids_never_lie(mask, blocks):
    sizes = Sizes(1, 1, 1, mask.total, mask.total + mask.extra, 4, 4)
    for one in (mask, mask.arranged(sizes)[0]):
        truth, found = pairs(one, sizes)[0, 0], layout(one, sizes, *blocks, {}, torch.device("cpu")).kind[0, 0]
        for a in range(found.shape[0]):
            for b in range(found.shape[1]):
                block = truth[a * blocks[0] : (a + 1) * blocks[0], b * blocks[1] : (b + 1) * blocks[1]]
                assert found[a, b] or not block.any()
                assert found[a, b] != FULL or block.all()
