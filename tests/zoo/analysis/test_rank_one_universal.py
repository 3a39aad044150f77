"""Vocabularies and directions that do not fit."""

import pytest
import torch

import regard
from regard.zoo.analysis.rank_one_universal import RankOneAttention, telling


def test_vocabularies_that_cannot_be_told_apart_are_refused():
    with pytest.raises(regard.RegardError, match="one token twice"):
        telling(torch.ones(3, 4))
    with pytest.raises(regard.RegardError, match="direction"):
        RankOneAttention(4, torch.ones(3))
