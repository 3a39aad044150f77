"""RNoPE-SWA's pattern of layers, and where attention goes."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.algebra import Causal, Rope, Window
from regard.zoo.softmax.rnope import attention_mass, rnope_layers


@pytest.mark.parametrize(
    ("options", "full", "window", "base"),
    [
        ({}, {3, 7}, 4096, 10000.0),
        ({"window": 5, "ratio": 3, "base": 500.0}, {2, 5, 8}, 5, 500.0),
        ({"first_full": True, "ratio": 2}, {0, 2, 4, 6, 8}, 4096, 10000.0),
        ({"ratio": 1}, set(range(10)), 4096, 10000.0),
    ],
)
@pytest.mark.parametrize("qk_norm", ["", "rms"])
def test_layers(options: dict[str, object], full: set[int], window: int, base: float, qk_norm: str) -> None:
    found = rnope_layers(10, **options, **({"qk_norm": qk_norm} if qk_norm else {}))  # type: ignore[arg-type]
    assert len(found) == 10
    for at, layer in enumerate(found):
        assert layer.recipe.qk_norm == qk_norm
        if at in full:
            assert layer.position is None and layer.mask == regard.algebra.Full() and not layer.recipe.rope
        else:
            assert layer.position == Rope(base) and layer.mask == (Causal() & Window(window))


def test_full_layers_of_a_decoder_take_no_positions() -> None:
    model = regard.nn.Decoder(rnope_layers(4, window=3), vocab=9, dim=8, layers=4, heads=2)
    assert [block.mixer.rope is None for block in model.blocks] == [True] * 4
    q, k, v = (torch.randn(1, 1, 6, 4, dtype=torch.float64) for _ in range(3))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(regard.attend(q, k, v, rnope_layers(4)[3], mask=regard.Causal()), plain)


def test_where_the_last_position_looks() -> None:
    w = torch.rand(2, 3, 20, 20)
    w = w / w.sum(-1, keepdim=True)
    last = w[:, :, 19].double().mean((0, 1)).tolist()
    found = attention_mass(w, (12, 14), (17, 20))
    want = {"begin": sum(last[:10]), "needle": sum(last[12:14]), "query": sum(last[17:])}
    want["context"] = sum(last) - sum(want.values())
    assert found == pytest.approx(want) and list(found) == ["begin", "needle", "query", "context"]
    assert attention_mass(w, (12, 14), (17, 20), begin=2)["begin"] == pytest.approx(sum(last[:2]))


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"layers": 3, "ratio": 0}])
def test_says_what_is_wrong(wrong: dict[str, int]) -> None:
    with pytest.raises(regard.RegardError, match="positive integers"):
        rnope_layers(**wrong)
    assert len(rnope_layers(1)) == 1
