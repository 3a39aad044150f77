"""Windowed sigmoid attention with slopes, in loops: every balance of slopes, odd heads, another base, slopes given."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import regard


def rotated(y: Tensor, position: int, base: float) -> Tensor:
    half = len(y) // 2
    angle = torch.tensor([position / base ** (c / half) for c in range(half)], dtype=torch.float64)
    a, b = y[:half], y[half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))


@pytest.mark.parametrize(
    ("options", "slopes"),
    [
        ({}, [0.5, 0.25, -0.5, -0.25]),
        ({"window": 3}, [0.5, 0.25, -0.5]),
        ({"balance": "negative", "base": 50.0}, [0.5, 0.25, 0.125]),
        ({"balance": "positive"}, [-0.5, -0.25, -0.125, -0.0625]),
        ({"window": 4, "given": True}, [0.1, -0.7]),
    ],
)
def test_attention(options: dict[str, object], slopes: list[float]) -> None:
    options, heads = dict(options), len(slopes)
    given = {"slopes": torch.tensor(slopes, dtype=torch.float64)} if options.pop("given", False) else {}
    window, base = int(options.get("window", 1024)), float(options.get("base", 10000.0))  # type: ignore[call-overload, arg-type]
    q, k, v = (torch.randn(1, heads, 8, 4, dtype=torch.float64) for _ in range(3))
    want = torch.zeros_like(v)
    for h, slope in enumerate(slopes):  # a positive slope favours recent keys
        for i in range(8):
            for j in range(max(0, i - window + 1), i + 1):
                s = float(rotated(q[0, h, i], i, base) @ rotated(k[0, h, j], j, base)) / 2 - slope * (i - j)
                want[0, h, i] += v[0, h, j] / (1 + math.exp(-s))
    torch.testing.assert_close(regard.attend(q, k, v, regard.get("swat", **options), **given), want)


def test_the_default_window_holds_1024_tokens_and_layers_keep_their_slopes() -> None:
    q, k, v = torch.randn(1, 1, 1, 2, dtype=torch.float64), *(torch.randn(1, 1, 1025, 2, dtype=torch.float64) for _ in range(2))
    flat = {"slopes": torch.zeros(1, dtype=torch.float64)}
    out, other = regard.attend(q, k, v, "swat", **flat), k.clone()
    other[:, :, 0] += 1
    assert torch.equal(regard.attend(q, other, v, "swat", **flat), out)
    other[:, :, 1] += 1
    assert not torch.equal(regard.attend(q, other, v, "swat", **flat), out)
    layer = regard.nn.Attention(8, 4, "swat")
    assert not list(layer.inputs.parameters()) and layer.inputs.fixed_slopes.tolist() == [0.5, 0.25, -0.5, -0.25]


def test_says_what_is_wrong() -> None:
    with pytest.raises(regard.RegardError, match="balanced, negative or positive"):
        regard.get("swat", balance="even")
