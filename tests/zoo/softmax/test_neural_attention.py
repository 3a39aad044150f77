"""Scores by a small network of pairs: the layer's own parameters, in loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import regard


@pytest.mark.parametrize("width", [16, 4])
@torch.no_grad()
def test_the_layer(width: int) -> None:
    layer = regard.nn.Attention(8, 2, regard.get("neural-attention", **({} if width == 16 else {"width": width}))).double()
    p = layer.inputs.learned
    assert {name: tuple(x.shape) for name, x in p.items()} == {
        "q_down": (width, 4),
        "k_down": (width, 4),
        "w1": (width, 2 * width),
        "w2": (width // 2, width),
        "w3": (width // 2,),
        "q_bias": (width,),
        "k_bias": (width,),
        "b1": (width,),
        "b2": (width // 2,),
        "b3": (),
    }
    for parameter in p.values():
        nn.init.normal_(parameter)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    q, k, v = (w(x)[0].view(5, 2, 4) for w in (layer.q, layer.k, layer.v))
    o = torch.zeros(5, 2, 4, dtype=torch.float64)
    for h in range(2):
        for i in range(5):
            s = []
            for j in range(i + 1):
                pair = torch.cat((p["q_down"] @ q[i, h] + p["q_bias"], p["k_down"] @ k[j, h] + p["k_bias"]))
                hidden = (p["w2"] @ (p["w1"] @ pair + p["b1"]).clamp_min(0) + p["b2"]).clamp_min(0)
                s.append(p["w3"] @ hidden + p["b3"])
            o[i, h] = torch.stack(s).softmax(0) @ v[: i + 1, h]
    torch.testing.assert_close(layer(x)[0], layer.out(o.flatten(1)))


def test_a_width_of_one_is_refused() -> None:
    with pytest.raises(regard.RegardError, match="at least 2"):
        regard.get("neural-attention", width=1)
