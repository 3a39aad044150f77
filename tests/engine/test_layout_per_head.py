"""Masks a head, some of which look at the head or read a tensor themselves: the blocks are each head's own."""

import torch

import regard
from regard.algebra import Causal, Explicit, PerHead, Weighted, Where, Window


def turns(b, h, i, j):
    return (j <= i) & ((i + h) % 3 != 0) | (i == j)


def test_masks_that_look_at_the_head_stand_in_their_own_head():
    q, k, v = (torch.randn(2, 4, 40, 8, dtype=torch.float64) for _ in range(3))
    visible = torch.rand(2, 1, 1, 40) > 0.3
    visible[..., 0] = True
    mask = PerHead((Causal() & Window(5), Where(turns))) & Explicit()
    found = regard.attend(q, k, v, Weighted(mask=mask), visible=visible)
    i, j = torch.arange(40)[:, None], torch.arange(40)
    for b in range(2):
        for h in range(4):
            seen = (turns(b, h, i, j) if h % 2 else (j <= i) & (i - j < 5)) & visible[b, 0]
            p = (q[b, h] @ k[b, h].T / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
            assert torch.allclose(found[b, h], p @ v[b, h], atol=1e-12)
