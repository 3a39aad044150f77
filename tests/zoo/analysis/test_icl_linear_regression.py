"""Prompts and heads that do not fit."""

import pytest
import torch

import regard
from regard.zoo.analysis.icl_linear_regression import RegressionHeads, head_pattern, planted_heads, regression_prompts


def test_prompts_and_heads_of_bad_sizes_are_refused():
    for call, message in (
        (lambda: regression_prompts(2, rho=1.0), "rho"),
        (lambda: RegressionHeads(normalizer="relu"), "normalizer"),
        (lambda: planted_heads(torch.ones(2), torch.ones(3), 4), "omega"),
        (lambda: head_pattern(RegressionHeads(4, 2, tasks=2)), "2 tasks"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            call()


def test_prompts_are_correlated_as_asked_for():
    x = regression_prompts(20_000, 1, 3, rho=0.5, generator=torch.Generator().manual_seed(0))[2]
    torch.testing.assert_close(x.T @ x / len(x), 0.5 ** (torch.arange(3)[:, None] - torch.arange(3)).abs().float(), rtol=0.05, atol=0.05)
