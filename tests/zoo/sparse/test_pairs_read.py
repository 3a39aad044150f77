"""How many pairs of queries and keys rows of their own making read, as `pairs_read` is told."""

from __future__ import annotations

import torch

from regard.algebra.part import Sizes
from regard.engine.meter import pairs_read
from regard.zoo.sparse.hip import hip
from regard.zoo.sparse.hylra import ReuseLayers, ReusePlan
from regard.zoo.sparse.hyperattention import hyper_attention
from regard.zoo.sparse.ltri_llm import LtriStream


def heads(length: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, count, length, 4) for count in (4, 2, 2))


def test_hylra_reads_triangles_and_chosen_keys() -> None:
    q, k, v = heads(11)
    layers = ReuseLayers(ReusePlan((None, 0), 0.0), 4, block=11, sinks=1, recent=1)
    with pairs_read() as pairs:
        layers.prompt(0, q, k, v)
    assert pairs.read == 2 * 4 * 11 * 12 // 2
    with pairs_read() as pairs:
        layers.prompt(1, q, k, v)
    assert pairs.read == 2 * 4 * 11 * 12 // 2  # a block's own keys come on top: here all
    blocks = ReuseLayers(ReusePlan((None, 0), 0.0), 2, block=4, sinks=0, recent=1)
    blocks.prompt(0, q, k, v)
    with pairs_read() as pairs:
        blocks.prompt(1, q, k, v)
    own = sum(range(1, 5)) * 2 + sum(range(1, 4))
    assert 2 * 4 * own <= pairs.read <= 2 * 4 * (own + 2 * 11)


def test_ltri_llm_reads_what_it_holds_and_itself() -> None:
    stream = LtriStream(window=50, sinks=2, top=1, budget=5)
    for old in (0, 5, 10):
        q, k, v = heads(5)
        with pairs_read() as pairs:
            stream(q, k, v)
        assert pairs.read == 2 * 4 * (5 * old + 15)


def test_hyperattention_reads_blocks_and_samples() -> None:
    q, k, v = heads(32)
    with pairs_read() as pairs:
        hyper_attention(q, k, v, min_length=40)
    assert pairs.read == 2 * 4 * 32 * 32
    with pairs_read() as pairs:
        hyper_attention(q, k, v, block_size=8, samples=0, min_length=4)
    assert pairs.read == 2 * 4 * 32 * 8
    with pairs_read() as pairs:
        hyper_attention(q, k, v, block_size=8, samples=3, min_length=4)
    assert 2 * 4 * 32 * 8 < pairs.read <= 2 * 4 * 32 * (8 + 3)
    with pairs_read() as pairs:
        hyper_attention(q, k, v, causal=True, min_length=32)
    assert pairs.read == 2 * 4 * 32 * 33 // 2


def test_hip_costs_nothing_where_all_is_read() -> None:
    for length in (10, 64):
        assert hip(mask_k=64).select.flops(Sizes(1, 2, 2, length, length, 8, 8)) == 0  # type: ignore[union-attr]
    assert hip(mask_k=1, block_k=8).select.flops(Sizes(1, 2, 2, 30, 30, 8, 8)) == 2 * 2 * 8 * 15 * 2 * 8 * 2  # type: ignore[union-attr]
