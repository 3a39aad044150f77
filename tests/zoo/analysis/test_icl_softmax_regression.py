"""Regressions that do not fit."""

import pytest
import torch

import regard
from regard.zoo.analysis.icl_softmax_regression import SoftmaxRegression, attention_prediction, prompts


def test_regressions_of_bad_shapes_are_refused():
    for call, message in (
        (lambda: SoftmaxRegression(torch.ones(3, 2), torch.ones(2)), "expected"),
        (lambda: attention_prediction(torch.ones(3, 2), torch.ones(3), torch.ones(1, 2), 0.0), "beta"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            call()


def test_prompts_hang_on_their_generator_alone():
    first, again, other = (prompts(3, 5, 2, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_weights_of_prompts_have_a_length_of_one_half_in_any_dimension():
    keys, values, query, answer = prompts(200, 30, 9, torch.Generator().manual_seed(0))
    table = torch.cat((keys, torch.ones(200, 30, 1)), -1)
    x = torch.linalg.lstsq(table.double(), values.double().log()[..., None]).solution[:, :, 0]
    assert float(x[:, :9].square().sum(1).mean().sqrt()) == pytest.approx(0.5, rel=0.05)
    torch.testing.assert_close((x * torch.cat((query, torch.ones(200, 1)), 1)).sum(1).exp(), answer.double(), rtol=1e-3, atol=1e-3)
