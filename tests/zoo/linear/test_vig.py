"""ViG: grids, class tokens and widths that do not fit, and a scale of the caller."""

from __future__ import annotations

import pytest
import torch

from regard import RegardError
from regard.zoo.linear.vig import BiGLA2D, both_directions


def test_what_does_not_fit() -> None:
    for heads, options in ((3, {}), (4, {"expand_k": 0.4}), (4, {"expand_v": 0.9})):
        with pytest.raises(RegardError, match=f"heads={heads}"):
            BiGLA2D(16, heads, **options)
    x = torch.randn(1, 12, 16)
    with pytest.raises(RegardError, match="expected 3 x 4 \\+ 1"):
        BiGLA2D(16, 2, cls=True)(x, (3, 4))
    with pytest.raises(RegardError, match=r"x has 12 tokens; expected 3 x 5$"):
        BiGLA2D(16, 2)(x, (3, 5))


def test_a_class_token_passes_the_convolution_by() -> None:
    torch.manual_seed(0)
    layer, x = BiGLA2D(16, 2, cls=True), torch.randn(2, 13, 16)
    local = layer.local(x, (3, 4))
    assert torch.equal(local[:, 0], x[:, 0])
    x[:, 0] += 1
    assert torch.equal(layer.local(x, (3, 4))[:, 1:], local[:, 1:])
    assert BiGLA2D(16, 2).local(x[:, 1:], (3, 4)).shape == (2, 12, 16)
    assert isinstance(layer.near, torch.nn.Identity) and layer.norm_far.eps == layer.norm_near.eps == 1e-5


def test_the_scale_of_a_call() -> None:
    q, k, v = (torch.randn(2, 2, 7, 4, dtype=torch.float64) for _ in range(3))
    a, b = (-torch.rand(2, 2, 7, 4, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(both_directions(q, k, v, a, b, scale=3.0), 6 * both_directions(q, k, v, a, b))
