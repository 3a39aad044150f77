"""Geometries and ranks that do not fit."""

import pytest
import torch

import regard
from regard.zoo.analysis.benefits_of_rank import RankedHeads, nearest_points, rank_one_error


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nearest_points(2, 4, 5, geometry="orthonormal"), "orthonormal"),
        (lambda: nearest_points(2, 4, 5, geometry="doubled"), "even"),
        (lambda: RankedHeads(4, 0, 1), "rank=0"),
        (lambda: rank_one_error(torch.ones(2, 3), torch.ones(2, 3)), r"\(H, 2\)"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(regard.RegardError, match=message):
        call()
