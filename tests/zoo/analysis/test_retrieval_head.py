"""What cannot be scored is refused."""

import pytest
import torch

import regard
from regard.zoo.analysis.retrieval_head import Needle, find_needle, hidden, retrieval_scores


def test_retrieval_refuses_what_it_cannot_score():
    model = regard.models.load("tiny")
    with pytest.raises(regard.RegardError, match="answered none of 1 prompts"):
        retrieval_scores(model, [Needle(torch.arange(1, 20), 3, 8)], limit=3)
    with pytest.raises(regard.RegardError, match="topk"):
        retrieval_scores(model, [], topk=0)
    with pytest.raises(regard.RegardError, match="depth"):
        hidden(torch.arange(3), torch.arange(2), torch.arange(2), 1.5)
    with pytest.raises(regard.RegardError, match="nowhere"):
        find_needle(torch.arange(5), [7, 8])
