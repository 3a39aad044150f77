"""Small parts of layers that whole-layer formulas leave to chance."""

from __future__ import annotations

import torch

import regard
from regard.algebra.part import Sizes
from regard.zoo.sparse.alternating_sparse_attention import GlobalLatentAttention
from regard.zoo.sparse.dhsa import rule_starts
from regard.zoo.sparse.flashmoba import KeyConv


def test_taps_are_learned_flashmoba() -> None:
    conv, k = KeyConv(2, 4).double(), torch.randn(1, 2, 9, 4, dtype=torch.float64)
    assert [name for name, _ in conv.named_parameters()] == ["taps"]
    conv(k).sum().backward()
    mean = torch.stack([torch.nn.functional.pad(k, (0, 0, lag, 0))[:, :, :9].sum((0, 2)) / 2 for lag in range(3)], 1)
    torch.testing.assert_close(conv.taps.grad, mean)  # silu'(0) = 1/2


def test_branches_are_gated_by_sigmoids_alternating_sparse_attention() -> None:
    layer, x = GlobalLatentAttention(32, 4, groups=2).double(), torch.randn(2, 5, 32, dtype=torch.float64)
    logits = x @ layer.gates.weight.T + (0 if layer.gates.bias is None else layer.gates.bias)
    found = layer.gate(x)
    for branch in range(2):
        for head in range(4):
            want = 1 / (1 + torch.exp(-logits[..., branch * 4 + head]))
            torch.testing.assert_close(found[branch][:, head, :, 0], want)


def test_cost_of_the_choice_dhsa() -> None:
    """Pooled chunks of queries against pooled chunks of keys, once for all heads."""
    sizes = Sizes(2, 4, 2, 160, 320, 16, 16)
    assert regard.get("dhsa", chunk=16).select.flops(sizes) == 2 * 2 * 16 * 10 * 20


def test_chunks_of_one_size_dhsa() -> None:
    starts = rule_starts(torch.randn(2, 1, 23, 4), 5, "fixed")
    assert [row.nonzero().flatten().tolist() for row in starts] == [[0, 5, 10, 15, 20]] * 2
