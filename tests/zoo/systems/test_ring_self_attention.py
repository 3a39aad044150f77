"""Ring self-attention: scale of the projected form, a block's sizes, half precision, what is refused."""

import pytest
import torch

from regard import RegardError
from regard.zoo.systems.ring_self_attention import SequenceParallelBlock, linformer_ring_attention, ring_self_attention


def parts(*shapes, hosts=3):
    return [[torch.randn(*shape) for _ in range(hosts)] for shape in shapes]


def test_scale_of_projected_keys():
    q, k, v, e, f = parts((2, 2, 4, 8), (2, 2, 4, 8), (2, 2, 4, 5), (6, 4), (6, 4))
    keys, values = torch.cat(e, 1) @ torch.cat(k, 2), torch.cat(f, 1) @ torch.cat(v, 2)
    found = torch.cat(linformer_ring_attention(q, k, v, e, f, scale=0.3), 2)
    assert torch.allclose(found, (0.3 * torch.cat(q, 2) @ keys.mT).softmax(-1) @ values, atol=1e-5)
    with pytest.raises(RegardError, match="C its tokens"):
        linformer_ring_attention(q, k, v, [x[:, :3] for x in e], f)


def test_widths_of_a_block_and_its_norms():
    block = SequenceParallelBlock(12, 3, hidden=7)
    assert (block.mlp[0].out_features, block.mlp[2].in_features, SequenceParallelBlock(12, 3).mlp[0].out_features) == (7, 7, 48)
    assert {block.norm1.eps, block.norm2.eps} == {1e-5} and not block.causal
    x = torch.randn(1, 6, 12)
    whole, cut = block([x])[0], torch.cat(block(list(x.chunk(2, 1))), 1)
    assert torch.allclose(whole, cut, atol=1e-5)
    with pytest.raises(RegardError, match="expected a multiple"):
        SequenceParallelBlock(10, 3)


def test_half_precision_takes_softmax_in_single():
    q, k, v = parts((1, 2, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16))
    truth = torch.cat(ring_self_attention(q, k, v), 2)
    half = torch.cat(ring_self_attention(*([x.bfloat16() for x in one] for one in (q, k, v))), 2)
    assert half.dtype == torch.bfloat16 and (half.float() - truth).abs().max() < 0.05
    a, b, c = (x[0].bfloat16() for x in (q, k, v))
    weights = (a @ b.mT * 0.25).float().softmax(-1).bfloat16()
    assert torch.equal(ring_self_attention([a], [b], [c])[0], weights @ c)


def test_parts_that_do_not_fit_are_refused():
    q, k, v = parts((2, 2, 4, 8), (2, 2, 4, 8), (2, 2, 4, 5))
    for bad in ((q[:2], k, v), (q, [x[..., :3] for x in k], v), (q, k, [x[:, :1] for x in v]), (q, k, [*v[:2], v[2][:1]])):
        with pytest.raises(RegardError, match="expected"):
            ring_self_attention(*bad)
