"""The locality dial by hand: logits of blocks, rules and anchors, penalties, bounds."""

from __future__ import annotations

import math

import pytest
import torch

import regard
from regard.zoo.softmax import localist_dial as localist


@pytest.mark.parametrize("dial", [0.0, 0.4, "tokens"])
def test_attention(dial: float | str) -> None:
    q, k, v = torch.randn(1, 2, 5, 4, dtype=torch.float64), *(torch.randn(1, 2, 7, 4, dtype=torch.float64) for _ in range(2))
    asked, kept = torch.tensor([[0.0, 1, 1, 2, 0]]), torch.tensor([[0.0, 0, 1, 1, 2, 2, 0]])
    turned = torch.rand(1, 2, 5, dtype=torch.float64) if dial == "tokens" else torch.full((1, 1, 1), dial, dtype=torch.float64)  # type: ignore[arg-type]
    rules = torch.randn(1, 2, 5, 7, dtype=torch.float64)
    want = torch.zeros(2, 5, 4, dtype=torch.float64)
    for h in range(2):
        for i in range(5):
            amount = float(turned.expand(1, 2, 5)[0, h, i])
            s = [float(q[0, h, i] @ k[0, h, j]) / 2 + float(rules[0, h, i, j]) for j in range(7)]
            s = [x + (math.log(1 - amount) if asked[0, i] != kept[0, j] else 0.0) for j, x in enumerate(s)]
            want[h, i] = torch.tensor(s, dtype=torch.float64).softmax(0) @ v[0, h]
    found = regard.attend(q, k, v, "localist-dial", query_block=asked, key_block=kept, dial=turned, rules=rules)
    torch.testing.assert_close(found[0], want)
    torch.testing.assert_close(regard.attend(q, k, v, "localist-dial"), regard.attend(q, k, v, "softmax"))


def test_penalties_and_their_proximal_step() -> None:
    groups = [torch.tensor([[3.0, 4.0]]), torch.tensor([0.3, 0.0, 0.4]), torch.zeros(4)]
    assert float(localist.group_penalty(groups)) == pytest.approx(math.sqrt(2) * 5 + math.sqrt(3) * 0.5)
    localist.proximal_step(groups, 0.5, 0.8)  # each norm falls by 0.4 sqrt(size)
    assert float(groups[0].norm()) == pytest.approx(5 - 0.4 * math.sqrt(2)) and float(groups[0][0, 0] / groups[0][0, 1]) == pytest.approx(
        0.75
    )
    assert bool((groups[1] == 0).all()) and bool((groups[2] == 0).all())
    localist.proximal_step(groups[2:], 0.5, 0.0)
    assert bool((groups[2] == 0).all())  # and no number at all without a penalty
    assert localist.critical_strength(torch.full((2, 8), 0.5)) == pytest.approx(0.5)


def test_anchors_and_rules() -> None:
    tokens, labels = torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 3
    found = localist.anchors(tokens, labels, 3)
    for b in range(3):
        away = tokens[labels == b].mean(0) - tokens.mean(0)
        torch.testing.assert_close(found[b], away / away.norm())
    q, block = torch.randn(2, 2, 5, 4, dtype=torch.float64), torch.randint(3, (2, 7))
    logits = localist.anchor_logits(q, block, found, 1.7)
    for b in range(2):
        for j in range(7):
            torch.testing.assert_close(logits[b, :, :, j], 1.7 * q[b] @ found[block[b, j]])
    kinds = torch.tensor([[0, 1, 1], [1, 0, 0]])
    keys = torch.tensor([[0, 2], [2, 1]])
    made = localist.rule_logits(kinds, keys, {(1, 2): 0.5, (0, 1): -math.inf})
    assert made.shape == (2, 1, 3, 2) and made[:, 0].tolist() == [[[0, 0], [0, 0.5], [0, 0.5]], [[0.5, 0], [0, -math.inf], [0, -math.inf]]]


def test_measures_and_bounds() -> None:
    w = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]], dtype=torch.float64)
    inside = torch.tensor([[True, True, False, False], [False, False, False, True]])
    torch.testing.assert_close(localist.leak(w, inside), torch.tensor([0.3, 0.3], dtype=torch.float64))
    torch.testing.assert_close(localist.leak_bound(inside, 2.0), torch.tensor([math.exp(-2.0), 3 * math.exp(-2.0)], dtype=torch.float64))
    torch.testing.assert_close(
        localist.leak_bound(inside, 2.0, 4.0), torch.tensor([math.exp(-0.5), 3 * math.exp(-0.5)], dtype=torch.float64)
    )
    leaked = torch.tensor([0.3, 0.0], dtype=torch.float64)
    h2 = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    want = torch.tensor([math.log(2) + h2 + 0.3 * math.log(2), 0.0], dtype=torch.float64)
    torch.testing.assert_close(localist.entropy_bound(inside, leaked), want)
    one_out, some = torch.tensor([[True, True, True, False]]), torch.tensor([0.3], dtype=torch.float64)
    torch.testing.assert_close(localist.entropy_bound(one_out, some), torch.tensor([math.log(3) + h2], dtype=torch.float64))
    whole = torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(
        localist.entropy_bound(whole, torch.zeros(1, dtype=torch.float64)), torch.tensor([math.log(4)], dtype=torch.float64)
    )
    with pytest.raises(regard.RegardError, match="at least one in every row"):
        localist.leak_bound(torch.tensor([[True], [False]]), 1.0)
