"""What layers and models of softmax rows begin with: deviations, means and zeros of the weights that they draw themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import regard
from regard.zoo.softmax.attention_sink import KeyValueBias, studied
from regard.zoo.softmax.dat import DualDecoder, DualViT, RelationalAttention
from regard.zoo.softmax.idw_attention import IDWClassifier
from regard.zoo.softmax.localist_dial import LocalistDecoder


def attention_sink() -> Iterator[tuple[Tensor, float]]:
    pair = KeyValueBias(512, 2, kv_heads=2)
    yield pair.key_bias, 0.02
    yield pair.value_bias, 0.0
    yield regard.nn.Attention(512, 2, studied("k-bias")).inputs.learned["sink"], 0.02


def dat() -> Iterator[tuple[Tensor, float]]:
    images = DualViT(3, 64, 4, dim=32, heads_sa=1, heads_ra=1, layers=1)
    yield DualDecoder(99, dim=32, layers=1).embed.weight, 0.02
    yield images.places, 0.02
    yield images.first, 0.0
    yield RelationalAttention(64, 9, 64, relations=9).w_r, 1 / 3


def idw_attention() -> Iterator[tuple[Tensor, float]]:
    yield IDWClassifier(30, 40, 3).keys, 1.0
    yield IDWClassifier(30, 40, 3).values, 0.0


def localist_dial() -> Iterator[tuple[Tensor, float]]:
    yield LocalistDecoder(torch.arange(99) // 9).embed.weight, 0.02


@pytest.mark.parametrize(
    "starts",
    [
        pytest.param(attention_sink, id="attention-sink"),
        pytest.param(dat, id="dat"),
        pytest.param(idw_attention, id="idw-attention"),
        pytest.param(localist_dial, id="localist-dial"),
    ],
)
def test_starts(starts: Callable[[], Iterator[tuple[Tensor, float]]]) -> None:
    torch.manual_seed(0)
    for weight, std in starts():
        if std == 0:
            assert bool((weight == 0).all())
            continue
        drawn = weight.detach().flatten()
        assert drawn.numel() >= 500
        assert float(drawn.std()) == pytest.approx(std, rel=0.15) and abs(float(drawn.mean())) < 0.15 * std
