"""Problems that do not fit."""

import pytest
import torch

import regard
from regard.zoo.analysis.attention_svm import AttentionProblem, descend, draw_problem, nuclear_svm


def test_problems_of_bad_shapes_are_refused():
    problem = draw_problem()
    for call, message in (
        (lambda: AttentionProblem(problem.tokens, problem.z[:, :2], problem.labels, problem.v), "expected"),
        (lambda: problem.constraints(torch.tensor([0, 1, 9])), "chosen"),
        (lambda: descend(problem, rank=2), "saddle"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            call()
    assert nuclear_svm(problem, rank=3, starts=2).feasible and "<svg" in descend(problem, steps=3).plot()
