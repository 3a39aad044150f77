"""Prompts of TCPA in hosts of other scales, the numbers that choose in its random start, and its dropped prompts."""

import pytest
import torch
from layers import vit

from regard.zoo.vision.tcpa import MASKS, TCPA, PromptPool

POOLS = {"size": 4, "length": 1, "top": 2}


@pytest.mark.parametrize("mask", MASKS)
def test_a_host_of_half_the_scale_and_twice_the_queries_says_the_same(mask):
    torch.manual_seed(0)
    net, x = TCPA(vit(), 3, POOLS, POOLS, mask).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    truth = net(x)[0]
    for block in net.vit.blocks:
        with torch.no_grad():
            block.attn.qkv.weight[:16] *= 2
            if block.attn.qkv.bias is not None:
                block.attn.qkv.bias[:16] *= 2
        block.attn.scale /= 2
    torch.testing.assert_close(net(x)[0], truth, rtol=1e-9, atol=1e-9)


def test_the_smallest_of_drawn_numbers_choose():
    torch.manual_seed(0)
    pool, tokens, draw = PromptPool(2, 6, 5, 2, 2), torch.randn(3, 4, 6), torch.rand(3, 4, 5)
    seen, off = pool.match(tokens, 1, draw)
    assert torch.equal(seen, draw <= draw.kthvalue(2, -1, keepdim=True).values)
    cosines = torch.cosine_similarity(tokens[:, :, None], pool.keys[1][None, None], -1)
    torch.testing.assert_close(off, 1 - cosines[seen].mean())
    none = pool.match(tokens[:0], 0)
    assert none[0].shape == (0, 4, 5) and float(none[1].detach()) == 0
    assert pool.length == 2 and pool.prompts.shape == (2, 5, 2, 6) and float(pool.prompts.detach().min()) < -0.8


def test_prompts_of_a_sample_are_dropped_by_themselves_and_scaled():
    torch.manual_seed(0)
    net = TCPA(vit(), 3, POOLS, POOLS, dropout=0.5).train()
    plain, found = net.eval().prompts(1, 2), net.train().prompts(1, 2)
    assert torch.equal(plain[0], torch.cat((net.own.prompts[1], net.shared.prompts[1])).flatten(0, 1)) and torch.equal(plain[0], plain[1])
    assert bool(((found == 0) | torch.isclose(found, 2 * plain)).all()) and not torch.equal(found[0], found[1])
