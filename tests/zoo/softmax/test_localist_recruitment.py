"""Recruitment by hand: bits of blocks and of tokens, splits, decisions, experts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from regard import RegardError
from regard.zoo.softmax import localist_recruitment as recruitment


def test_bits_of_blocks_and_tokens() -> None:
    assert recruitment.block_cost(1024, 4, 17) == 17 / 2 * 10 + 2 and recruitment.block_cost(1, 0, 2) == 1.0
    x, means = torch.randn(40, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    bits, labels = recruitment.coded(x, means)
    gaps = [[float(((a - m) ** 2).sum()) for m in means] for a in x]
    variance = sum(min(row) for row in gaps) / 120
    for n, row in enumerate(gaps):
        assert int(labels[n]) == row.index(min(row))
        density = math.exp(-min(row) / (2 * variance)) / (2 * math.pi * variance) ** 1.5
        assert float(bits[n]) == pytest.approx(-math.log2(density) + 2)


def test_sweeps_and_splits() -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [10.0, 0.0], [10.0, 1.0], [20.0, 0.0]], dtype=torch.float64)
    means = torch.tensor([[1.0, 0.0], [11.0, 0.0], [99.0, 0.0]], dtype=torch.float64)
    once = recruitment.refined(x, means, sweeps=1)
    torch.testing.assert_close(once, torch.tensor([[0.0, 0.5], [40 / 3, 1 / 3], [99.0, 0.0]], dtype=torch.float64))
    far = recruitment.refined(x, torch.tensor([[0.0, 0.0], [6.0, 0.0], [15.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(far, torch.tensor([[0.0, 0.5], [10.0, 0.5], [20.0, 0.0]], dtype=torch.float64))
    labels, centres = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([[5.0, 0.5], [20.0, 0.0]], dtype=torch.float64)
    halves = recruitment.split(x, labels, centres, 0)
    assert halves.shape == (3, 2) and halves[0].tolist() == [20.0, 0.0]
    assert sorted(halves[1:].tolist()) == [[0.0, 0.5], [10.0, 0.5]]
    same = recruitment.split(torch.ones(3, 2), torch.zeros(3, dtype=torch.long), torch.ones(1, 2), 0)
    assert torch.equal(same, torch.ones(2, 2))


def clusters(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = 8 * torch.eye(8, dtype=torch.float64)[:count]
    return centres[torch.arange(300) % count] + torch.randn(300, 8, generator=generator, dtype=torch.float64)


def test_every_decision_is_accounted_for_in_bits() -> None:
    x = clusters(3)
    found = recruitment.recruit(x)
    assert len(found.means) == 3 and torch.equal(found.labels, recruitment.coded(x, found.means)[1])
    bits = float(recruitment.coded(x, found.means)[0].sum())
    assert found.length == pytest.approx(bits + 3 * recruitment.block_cost(300, 3, 9))
    last = float(recruitment.coded(x, x.mean(0, keepdim=True))[0].sum()) + recruitment.block_cost(300, 1, 9)
    for one in found.trace:
        if one.accepted:
            assert one.length == pytest.approx(last - one.gain + one.cost) and one.length < last - 8
        else:
            assert one.length == pytest.approx(last) and one.gain - one.cost <= 8
        last = one.length
    assert found.accepted == [one for one in found.trace if one.accepted] and len(found.accepted) == 2
    first = found.trace[0]
    assert (first.what, first.block) == ("recruit", 0) and first.cost == pytest.approx(
        2 * recruitment.block_cost(300, 2, 9) - recruitment.block_cost(300, 1, 9)
    )
    assert {one.what for one in found.trace if not one.accepted} == {"recruit", "prune"}
    torch.testing.assert_close(found.anchors, found.means / found.means.norm(dim=-1, keepdim=True))
    assert found.plot().startswith("<svg")


def test_margins_prices_and_limits() -> None:
    x = clusters(3)
    gain = max(one.gain - one.cost for one in recruitment.recruit(x).accepted)
    assert len(recruitment.recruit(x, margin=gain + 1).means) < 3
    assert len(recruitment.recruit(x, cost_factor=1000.0).means) == 1
    assert len(recruitment.recruit(x, cost=lambda n, blocks, parameters: 0.0 if (n, parameters) == (300, 9) else 1e9).means) >= 3
    assert len(recruitment.recruit(x, max_blocks=2).means) == 2
    few = torch.cat((torch.zeros(3, 1), 50 + torch.arange(3.0)[:, None]))
    assert len(recruitment.recruit(few, margin=0.1, cost_factor=0.0).means) <= 2  # blocks of fewer than four tokens are not split


def test_blocks_that_no_longer_pay_are_pruned() -> None:
    prices = iter([0.0] * 40)

    def cheap_at_first(n: int, blocks: int, parameters: int) -> float:
        return next(prices, 500.0)

    x = clusters(3)
    found = recruitment.recruit(x, cost=cheap_at_first)
    assert any(one.what == "prune" for one in found.trace)


def text(table: Tensor, count: int, generator: torch.Generator) -> Tensor:
    tokens = [0]
    for _ in range(count - 1):
        tokens.append(int(torch.multinomial(table[tokens[-1]], 1, generator=generator)))
    return torch.tensor(tokens)


def test_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = [torch.softmax(3 * torch.randn(5, 5, generator=generator), -1) for _ in range(2)]
    domains = [(torch.randn(6, generator=generator), text(tables[n], 800, generator)) for n in (0, 0, 1)]
    found = recruitment.recruit_experts(domains, 5)
    assert [one.accepted for one in found.trace] == [True, False, True] and [one.block for one in found.trace] == [0, 1, 2]

    def bits(model: Tensor, tokens: Tensor) -> float:
        return sum(-math.log2(float(model[a, b])) for a, b in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))

    def trained(tokens: Tensor) -> tuple[Tensor, int]:
        counts = torch.full((5, 5), 0.5)
        for a, b in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True):
            counts[a, b] += 1
        return counts / counts.sum(-1, keepdim=True), int((counts > 0.5).sum())

    length, models = 0.0, []
    for (_, tokens), one in zip(domains, found.trace, strict=True):
        own, used = trained(tokens[:400])
        held = tokens[400:]
        known = min((bits(model, held) for model in models), default=400 * math.log2(5))
        cost = used / 2 * math.log2(800)
        assert one.gain == pytest.approx(known - bits(own, held), rel=1e-5) and one.cost == pytest.approx(cost)
        length += bits(own, held) + cost if one.accepted else known
        assert one.length == pytest.approx(length, rel=1e-5) and one.what == "recruit"
        if one.accepted:
            models.append(own)
    for model, want in zip(found.models, models, strict=True):
        torch.testing.assert_close(model, want)
    anchors = torch.stack([domains[n][0] / domains[n][0].norm() for n in (0, 2)])
    torch.testing.assert_close(found.anchors, anchors)
    x = torch.randn(4, 6)
    torch.testing.assert_close(found.route(x), (x / x.norm(dim=-1, keepdim=True) @ anchors.T / 0.1).softmax(-1))
    torch.testing.assert_close(found.route(x, 2.0), (x / x.norm(dim=-1, keepdim=True) @ anchors.T / 2).softmax(-1))
    gain = found.trace[2].gain
    for price, kept in ((gain - 8.5, 2), (gain - 7.5, 1), (gain + 1, 1)):
        assert len(recruitment.recruit_experts(domains, 5, price=price).models) == kept
    assert len(recruitment.recruit_experts(domains, 5, price=0.0, margin=gain + 1).models) == 1


@pytest.mark.parametrize(("x", "margin"), [(torch.ones(5), 8.0), (torch.ones(3, 2), 8.0), (torch.ones(5, 2), 0.0)])
def test_says_what_is_wrong(x: Tensor, margin: float) -> None:
    with pytest.raises(RegardError, match="positive margin"):
        recruitment.recruit(x, margin=margin)
    recruitment.recruit(torch.randn(4, 2))
