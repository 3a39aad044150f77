"""Token-aware phases in loops: both phases, other powers of the distance and splits of channels."""

from __future__ import annotations

import math

import pytest
import torch

import regard


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.6}, {"theta": 0.25}, {"phase": "linear"}, {"phase": "linear", "theta": 0.75, "alpha": 0.3}]
)
@pytest.mark.parametrize("causal", [True, False])
def test_attention(options: dict[str, object], causal: bool) -> None:
    q, k, v = (torch.randn(1, 1, 7, 8, dtype=torch.float64) for _ in range(3))
    alpha, own = float(options.get("alpha", 0.1)), round(8 * float(options.get("theta", 0.5)))  # type: ignore[arg-type]
    want = torch.zeros_like(v)
    for i in range(7):
        s = []
        for j in range(i + 1 if causal else 7):
            a, b = q[0, 0, i], k[0, 0, j]
            phi = float(a[own:] @ b[own:]) if options.get("phase") != "linear" else float(a[own:].sum() + b[own:].sum())
            turn = 2 * math.pi * abs(i - j) ** alpha * phi / math.sqrt(8 - own)
            s.append(float(a[:own] @ b[:own]) / math.sqrt(own) * math.cos(turn))
        want[0, 0, i] = torch.tensor(s, dtype=torch.float64).softmax(0) @ v[0, 0, : len(s)]
    found = regard.attend(q, k, v, regard.get("tapa", **options), mask=regard.Causal() if causal else None)
    torch.testing.assert_close(found, want)


def test_layers_take_no_rotary_positions() -> None:
    assert regard.nn.Attention(8, 2, "tapa", rope=True).rope is None
    assert regard.get("tapa") == regard.get("tapa", alpha=0.1, theta=0.5, phase="quadratic")


@pytest.mark.parametrize("wrong", [{"phase": "cubic"}, {"theta": 0.0}, {"theta": 1.0}])
def test_says_what_is_wrong(wrong: dict[str, object]) -> None:
    with pytest.raises(regard.RegardError, match="quadratic or linear"):
        regard.get("tapa", **wrong)
