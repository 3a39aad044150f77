"""What linear rows have beside their mechanism: how a power focuses, norms that let go of LayerNorm."""

import copy

import pytest
import torch
from torch import nn

import regard
from regard import RegardError
from regard.nn import Decoder, NSAAttention
from regard.zoo.linear.flatten import focus_gap
from regard.zoo.linear.kernelized_attention_rpe import fast_length
from regard.zoo.linear.lalte import lalte_layers
from regard.zoo.linear.sea import SEAAttention, distil_sea
from regard.zoo.linear.slab import PRepBN, convert_norms


def test_flatten_s_powers_tell_directions_apart():
    gaps = [focus_gap(p) for p in (1.0, 2.0, 3.0)]
    assert gaps[2] > 3 * gaps[0] and gaps[0] < gaps[1] < gaps[2]
    assert gaps[0] == pytest.approx(0.041, abs=0.01) and gaps[2] == pytest.approx(0.203, abs=0.03)


def test_slab_s_norms_become_affine_maps():
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6)).double()
    with torch.no_grad():
        for part in (net[0], net[2]):
            part.weight.uniform_(0.5, 2)
            part.bias.normal_()
    x, before = torch.randn(32, 5, 6, dtype=torch.float64), copy.deepcopy(net)
    with convert_norms(net, 3) as done:
        assert done.names == ("0", "2") and isinstance(net[0], PRepBN) and net[0].step_count.dtype == torch.long
        torch.testing.assert_close(net(x), before(x))  # step 0
        assert not torch.allclose(net(x), before(x))
        for _ in range(60):
            net(x)
        assert net[0].share == 0
        flat = x.flatten(0, 1)
        own = (x - flat.mean(0)) / (flat.var(0, correction=0) + 1e-5).sqrt() * before[0].weight + before[0].bias + x
        torch.testing.assert_close(net.train()[0](x), own)
        net.eval()
        torch.testing.assert_close(net[0].fuse(net[1])(x), net[1](net[0](x)))
    torch.testing.assert_close(net(x), before(x))
    with pytest.raises(RegardError, match="one dimension"):
        convert_norms(nn.Sequential(nn.LayerNorm((2, 3))), 3)


def test_lalte_s_stack_with_native_sparse_attention():
    torch.manual_seed(0)
    sizes = {"size": 4, "stride": 2, "block_size": 4, "top_k": 1, "window": 4}
    mixers = lalte_layers(4, 16, 2, "lansa", **sizes)
    assert [isinstance(one, NSAAttention) for one in mixers] == [False, True, False, True]
    model, tokens = Decoder(mixers, vocab=12, dim=16, layers=4, heads=2).double(), torch.randint(12, (1, 14))
    assert torch.allclose(model(tokens)[:, :9], model(tokens[:, :9]))
    assert not any(isinstance(one, NSAAttention) for one in lalte_layers(2, 16, 2))
    with pytest.raises(RegardError, match="kind='other'"):
        lalte_layers(2, 16, 2, "other")


def test_sea_learns_from_a_model():
    torch.manual_seed(0)
    model = Decoder("softmax", vocab=12, dim=16, layers=2, heads=2, kv_heads=1).train()
    kept = copy.deepcopy(model.state_dict())
    given = {"causal": True, "cells": 8, "keys": 4, "features": 8}
    made, losses = distil_sea(model, lambda generator: torch.randint(12, (4, 20), generator=generator), 12, layers=[1], lr=3e-2, **given)
    assert list(made) == [1] and made[1].causal and model.training
    assert sum(losses[1][-3:]) < 0.8 * sum(losses[1][:3])
    assert all(torch.equal(x, kept[name]) for name, x in model.state_dict().items())
    first, _ = distil_sea(model, lambda generator: torch.randint(12, (4, 20), generator=generator), 1, layers=[1], lr=3e-2, **given)
    with torch.no_grad():
        x = model.blocks[1].norm1(model.blocks[0](model.embed(torch.randint(12, (4, 20), generator=torch.Generator().manual_seed(0)))))
        q, k, v, _ = model.blocks[1].mixer.heads_of(x, x, 0, None)
        torch.manual_seed(0)
        fresh = SEAAttention(2, 8, **given)
        assert losses[1][0] == pytest.approx(float(fresh.losses(q, k.expand_as(q), v.expand_as(q))["total"]), rel=1e-4)
    assert not torch.equal(first[1].decoder.weight, made[1].decoder.weight)
    with pytest.raises(RegardError, match="steps=0"):
        distil_sea(model, lambda generator: torch.zeros(1, 4, dtype=torch.long), 0, **given)


def test_kernelized_attention_rpe_s_lengths_are_the_least_smooth_ones():
    smooth = sorted(2**a * 3**b * 5**c for a in range(11) for b in range(7) for c in range(5))
    for n in (*range(1, 260), 400, 625, 626, 729, 730, 1000):
        assert fast_length(n) == next(x for x in smooth if x >= n)


def test_performer_s_generalized_form_declares_its_projection_alone():
    names = {kernel: {item.name for item in regard.get("performer", kernel=kernel).declared} for kernel in ("softmax", "relu")}
    assert names == {"softmax": {"projection", "key_shift"}, "relu": {"projection"}}
