"""Short convolutions stop at padding and at the ends of documents, in every recipe that has them."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.catalog.registry import entries

OPTIONAL = {"gla": {"short_conv": 4}, "gsa": {"short_conv": 4}, "lightnet": {"short_conv": 4}}


def recipes() -> list[str]:
    made = {name: regard.get(name, **OPTIONAL.get(name, {})) for name, entry in entries().items() if entry.kind == "mechanism"}
    return [name for name, mechanism in made.items() if mechanism.recipe_of.short_conv]


def layer_of(name: str) -> regard.nn.Attention:
    return regard.nn.Attention(16, 2, regard.get(name, **OPTIONAL.get(name, {}))).double()


def test_every_recipe_is_met() -> None:
    assert {"deltanet", "efla", "log-linear-attention", *OPTIONAL} <= set(recipes())


@pytest.mark.parametrize("name", recipes())
def test_padding(name: str) -> None:
    layer, x = layer_of(name), torch.randn(2, 13, 16, dtype=torch.float64)
    keep = torch.arange(13).expand(2, -1) >= torch.tensor([[4], [0]])
    with torch.no_grad():
        try:
            out = layer(x, mask=regard.Padding(), keep=keep)
        except regard.RegardError:  # spans are counted from the first token
            assert name == "log-linear-attention"
            return
        torch.testing.assert_close(out[:1, 4:], layer(x[:1, 4:]), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out[1:], layer(x[1:]), rtol=1e-9, atol=1e-9)
        other = x.clone()
        other[0, :4] = float("nan")
        torch.testing.assert_close(layer(other, mask=regard.Padding(), keep=keep)[:1, 4:], out[:1, 4:], rtol=1e-9, atol=1e-9)
        state, outs = None, []
        for t in range(13):
            y, state = layer.step(x[:, t : t + 1], state, mask=regard.Padding(), keep=keep[:, : t + 1])
            outs.append(y)
        torch.testing.assert_close(torch.cat(outs, 1)[:1, 4:], out[:1, 4:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", recipes())
def test_documents(name: str) -> None:
    layer, x = layer_of(name), torch.randn(1, 13, 16, dtype=torch.float64)
    segments = torch.tensor([[7] * 5 + [2] * 8])
    with torch.no_grad():
        out = layer(x, mask=regard.Segments(), segments=segments)
        torch.testing.assert_close(out[:, :5], layer(x[:, :5]), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out[:, 5:], layer(x[:, 5:]), rtol=1e-9, atol=1e-9)
        x[0, 2] = float("nan")
        again = layer(x, mask=regard.Segments(), segments=segments)
    assert bool(again[:, 5:].isfinite().all())


def test_a_mask_that_says_neither_is_refused() -> None:
    with pytest.raises(regard.RegardError, match="short convolution"):
        layer_of("deltanet")(torch.randn(1, 5, 16, dtype=torch.float64), mask=regard.Window(3))
