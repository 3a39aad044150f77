"""Sizes and matrices that have no closed form."""

import pytest
import torch

import regard
from regard.zoo.analysis.fixed_head_size import FixedHeadMHA, low_rank_bottleneck


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FixedHeadMHA(8, 2, 0), "head_size"),
        (lambda: low_rank_bottleneck(torch.randn(4, 8), torch.eye(4), 4), "positive"),
        (lambda: low_rank_bottleneck(torch.ones(4, 8), torch.full((4, 4), 0.25), 4), "rank below"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(regard.RegardError, match=message):
        call()


def test_options_reach_the_layer():
    plain = FixedHeadMHA(6, 2, 5)
    assert sum(p.numel() for p in plain.parameters()) == 4 * 6 * 2 * 5 and not plain.causal and plain.rope is None
    layer = FixedHeadMHA(6, 2, 4, causal=True, rope=True, bias=True, dropout=0.25)
    assert layer.causal and layer.rope is not None and layer.dropout == 0.25 and layer.q.bias is not None and layer.out.bias is not None
    assert layer.q.out_features == 8 and layer.out.in_features == 8


def test_the_bottleneck_is_sought_from_its_seed_by_its_rate():
    x = torch.eye(4, dtype=torch.float64)
    target = torch.rand(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).add(0.1)
    target = target / target.sum(-1, keepdim=True)
    wide = low_rank_bottleneck(x, target, 5, steps=0)
    assert wide.exact and wide.error < 1e-12 and wide.wq.shape == (4, 5) and not wide.wq[:, 4].any()
    first = low_rank_bottleneck(x, target, 2, steps=1, lr=0.0)
    other = low_rank_bottleneck(x, target, 2, steps=1, lr=0.0, seed=1)
    assert not first.exact and 0 < float((first.wq - other.wq).abs().max()) < 1e-2
    for lr in (0.01, 0.1):
        moved = low_rank_bottleneck(x, target, 2, steps=1, lr=lr)
        assert float((moved.wq - first.wq).abs().max()) == pytest.approx(lr, rel=1e-3)
    assert low_rank_bottleneck(x, target, 2, steps=60).error < first.error
