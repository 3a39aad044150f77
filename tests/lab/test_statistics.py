"""Statistics of weights against loops and known cases."""

import math

import pytest
import torch

import regard
from regard.lab.quantisation import quantised
from regard.tasks import statistics as S
from regard.zoo.softmax.attention_sink import TRIGGERS, sink_experiment, text


def maps(*shape, k_len=None):
    k_len = k_len or shape[-1]
    s = torch.randn(*shape[:-1], k_len).masked_fill(torch.ones(shape[-2], k_len, dtype=torch.bool).triu(1 + k_len - shape[-2]), -math.inf)
    return s.softmax(-1)


def test_importance_and_sink_rate_equal_loops():
    w = maps(3, 2, 9, 9)
    for a in range(3):
        for h in range(2):
            for k in range(9):
                mean = sum(float(w[a, h, i, k]) for i in range(k, 9)) / (9 - k)
                assert abs(float(S.importance(w)[a, h, k]) - mean) < 1e-6
    count = sum(float(S.importance(w)[a, h, 0]) > 0.3 for a in range(3) for h in range(2))
    assert S.sink_rate(w) == count / 6
    first = torch.zeros(1, 4, 4)
    first[..., 0] = 1
    assert S.sink_rate(first) == 1 and S.sink_rate(first, position=1) == 0


def test_importance_of_a_few_last_queries():
    w = maps(1, 3, 3, k_len=8)
    assert torch.allclose(S.importance(w)[0, 7], w[0, 2, 7].double()) and torch.allclose(S.importance(w)[0, 0], w[0, :, 0].double().mean())


def test_density_confidence_and_signs():
    w = torch.tensor([[[1.0, 0.0], [0.5, -0.5]]])
    assert S.density(w) == 1.0 and S.density(torch.tensor([[1.0, 0.0], [1.0, 0.0]])) == pytest.approx(2 / 3)
    assert S.negative_mass(w) == pytest.approx(0.25)
    assert float(S.confidence(w)) == 0.75


def test_diversity_entropy_and_doubly_stochastic():
    same = maps(1, 6, 6).expand(4, 6, 6)
    apart = torch.stack([torch.eye(6), torch.eye(6).roll(1, 1)])
    assert abs(S.head_diversity(same)) < 1e-9 and S.head_diversity(apart) == pytest.approx(math.log(2))
    assert float(S.entropy(torch.full((2, 8), 1 / 8))[0]) == pytest.approx(math.log(8))
    assert S.stochastic_gap(torch.eye(5)) == 0 and S.stochastic_gap(torch.eye(5)[[0, 0, 0, 0, 0]]) == pytest.approx(8 / 5)


def test_kurtosis_and_collapse():
    assert S.kurtosis(torch.randn(200_000)) == pytest.approx(3, abs=0.1)
    assert S.kurtosis(torch.cat((torch.randn(1000), torch.tensor([100.0])))) > 100
    x = torch.randn(2, 30, 8)
    assert S.token_distance(x + 100) < 0.1 * S.token_distance(x)


def test_errors():
    with pytest.raises(regard.RegardError, match=r"expected .*Lq <= Lk"):
        S.sink_rate(torch.ones(4, 3))
    with pytest.raises(regard.RegardError, match="at least 3"):
        S.head_diversity(torch.ones(3, 3))


def test_triggers_repeat_the_token_before_them():
    tokens, copied = text(50, 32, torch.Generator().manual_seed(0))
    rows, at = copied.nonzero(as_tuple=True)
    assert len(rows) > 50
    assert torch.isin(tokens[rows, at], torch.tensor(TRIGGERS)).all() and torch.equal(tokens[rows, at + 1], tokens[rows, at - 1])


def test_experiment_learns():
    result = sink_experiment("softpick", steps=60)
    assert sum(result.loss[-10:]) < 0.97 * sum(result.loss[:10]) and 0 <= result.sink_rate <= 1


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_stays_within_half_a_level(bits):
    layer = torch.nn.Sequential(torch.nn.Linear(16, 8))
    smaller = quantised(layer, bits)
    level = layer[0].weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((smaller[0].weight - layer[0].weight).abs() <= level / 2 + 1e-6).all()
    assert all(len(row.unique()) <= 2**bits - 1 for row in smaller[0].weight)
    with pytest.raises(regard.RegardError, match="bits=1"):
        quantised(layer, 1)
