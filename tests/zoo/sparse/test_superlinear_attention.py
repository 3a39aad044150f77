"""Anchors, spans and windows of single queries, by their formulas."""

from __future__ import annotations

import math

import pytest

from regard.zoo.sparse.superlinear_attention import anchors_of, covered, span_of, window_size


@pytest.mark.parametrize(("skip", "backward", "forward"), [(0, 2.0, 0.0), (1, 1.0, 0.5), (3, 0.5, 2.0), (2, 0.0, 1.3)])
@pytest.mark.parametrize(("power", "span_power"), [(2.0, 0.5), (1.5, 0.3), (2.5, 0.3)])
def test_spans_by_hand(skip: int, backward: float, forward: float, power: float, span_power: float) -> None:
    free = 0
    for t in (0, 3, 8, 40, 99, 150):
        steps = [math.floor(i**power + 1e-9) for i in range(skip + 1, t + 3)]
        anchors = [t - step + 1 for step in steps if step <= t + 1]
        near = max(1, math.floor((skip + 1) ** power + 1e-9) - 1)
        assert anchors_of(t, skip, power) == anchors and window_size(skip, power) == near
        for a in anchors:
            back, ahead = (math.ceil(x * (t + 1) ** span_power - 1e-9) for x in (backward, forward))
            free += ahead > 0 and a + ahead < t - near
            assert span_of(t, a, skip, backward, forward, span_power, power) == (max(0, a - back), min(a + ahead, t - near))
    assert free or not forward  # spans that end by themselves, not at the window


def test_squares_and_roots_are_the_usual_ones_and_keys_that_are_reached() -> None:
    assert anchors_of(24, 1) == anchors_of(24, 1, 2.0) == [21, 16, 9, 0] and window_size(3) == window_size(3, 2.0) == 15
    assert span_of(24, 9, 1, 0.2, 0.4) == span_of(24, 9, 1, 0.2, 0.4, 0.5, 2.0) == (8, 11)
    for forward in (0.0, 0.4):
        truth = set(range(22, 25))
        for a in (21, 16, 9, 0):
            truth |= set(range(max(0, a - 1), min(a + math.ceil(forward * 5), 21) + 1))
        assert covered(24, 1, 0.2, forward) == truth
    assert covered(24, 1, 0.2) == covered(24, 1, 0.2, 0.0)
