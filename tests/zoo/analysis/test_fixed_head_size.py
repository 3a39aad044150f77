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
