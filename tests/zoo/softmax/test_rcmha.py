"""Relative convolutional attention: the whole layer and the paper's block by hand, ablations, released tables."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.zoo.softmax.rcmha import HeadConv, RelativeConvMHA, SquaredReLUBlock


def scrambled(**options: object) -> RelativeConvMHA:
    layer = RelativeConvMHA(2, 8, max_rel=16, **options).double()  # type: ignore[arg-type]
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@torch.no_grad()
def by_hand(layer: RelativeConvMHA, x: Tensor, kernel: int) -> Tensor:
    n, heads, d = len(x), 2, 4
    parts = []
    for at, w in enumerate((layer.q, layer.k, layer.v)):
        y = w(x).view(n, heads, d)
        if layer.head_convs:
            conv, out = layer.head_convs[at], torch.zeros_like(y)
            for t in range(n):
                out[t] = conv.bias + sum(conv.weight[:, r] * y[t - r] for r in range(min(kernel, t + 1)))
            y = out
        parts.append(y)
    q, k, v = parts
    learned, o = layer.inputs.learned, torch.zeros(n, heads, d, dtype=torch.float64)
    for h in range(heads):
        for i in range(n):
            s = []
            for j in range(i + 1):
                score = q[i, h] @ k[j, h]
                if "table" in learned:
                    at = i - j + 16
                    score = score + learned["content"][h] @ k[j, h] + q[i, h] @ learned["table"][at, h] + learned["apart"][at, h]
                s.append(score / math.sqrt(d))
            o[i, h] = torch.stack(s).softmax(0) @ v[: i + 1, h]
    return layer.out(o.flatten(1))


@pytest.mark.parametrize(
    "options", [{}, {"kernel": 4}, {"conv": False}, {"relative": False}, {"conv": False, "relative": False}, {"bias": True}]
)
def test_the_layer_and_its_steps(options: dict[str, object]) -> None:
    layer, x = scrambled(**options), torch.randn(1, 9, 8, dtype=torch.float64)
    want = by_hand(layer, x[0], int(options.get("kernel", 3)))  # type: ignore[call-overload]
    torch.testing.assert_close(layer(x)[0], want)
    state, outs = None, []
    for a, b in ((0, 1), (1, 2), (2, 6), (6, 9)):
        y, state = layer.step(x[:, a:b], state)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1)[0], want)


@pytest.mark.parametrize("conv", [True, False])
def test_packed_documents_and_padding_are_as_if_alone(conv: bool) -> None:
    layer, x = scrambled(conv=conv, kernel=4), torch.randn(2, 9, 8, dtype=torch.float64)
    ids = torch.tensor([[0] * 4 + [1] * 5, [2] * 1 + [3] * 8])
    want = torch.stack([torch.cat([layer(part)[0] for part in x[b : b + 1].split(cut, 1)]) for b, cut in ((0, [4, 5]), (1, [1, 8]))])
    torch.testing.assert_close(layer(x, mask=regard.Segments(), segments=ids), want)
    keep = torch.tensor([[False] * 3 + [True] * 6, [True] * 9])
    found = layer(torch.where(keep[..., None], x, 99.0), mask=regard.Padding(), keep=keep)
    torch.testing.assert_close(found[0, 3:], layer(x[:1, 3:])[0])
    torch.testing.assert_close(found[1], layer(x[1:])[0])
    state, outs = None, []
    for a, b in ((0, 2), (2, 5), (5, 9)):
        y, state = layer.step(x[:, a:b], state, mask=regard.Padding(), keep=keep[:, :b])
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1)[0, 3:], layer(x[:1, 3:])[0])
    if conv:
        with pytest.raises(regard.RegardError, match="reads neighbours"):
            layer(x, mask=regard.Window(3))


def test_the_block() -> None:
    block, x = SquaredReLUBlock(scrambled(), 20).double(), torch.randn(2, 5, 8, dtype=torch.float64)

    def norm(y: Tensor) -> Tensor:
        away = y - y.mean(-1, keepdim=True)
        return away / (away.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    y = x + block.attention(norm(x))
    hidden = (norm(y) @ block.up.weight.T + block.up.bias).clamp_min(0) ** 2
    torch.testing.assert_close(block(x), y + hidden @ block.down.weight.T + block.down.bias)


def test_tables_and_filters_of_released_code() -> None:
    """There rows are counted P + j - i and filters from the oldest token on."""
    reach, n = 8, 6
    released = torch.randn(2 * reach, 2, 4, dtype=torch.float64)
    ours = released.flip(0).roll(1, 0)
    for i in range(n):
        for j in range(i + 1):
            torch.testing.assert_close(ours[reach + i - j], released[reach + j - i])
    conv, x = HeadConv(4, 3).double(), torch.randn(1, 1, n, 4, dtype=torch.float64)
    released = torch.randn(4, 1, 3, dtype=torch.float64)
    conv.weight.data = released[:, 0].flip(1)
    want = nn.functional.conv1d(nn.functional.pad(x[0].mT, (2, 0)), released, groups=4).mT
    torch.testing.assert_close(conv(x)[0][0], want)


def test_a_new_layer_is_softmax_attention() -> None:
    layer, x = RelativeConvMHA(2, 8).double(), torch.randn(1, 9, 8, dtype=torch.float64)
    plain = regard.nn.Attention(8, 2).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(x), plain(x))
    assert layer.inputs.learned["table"].shape == (8192, 2, 4) and layer.head_convs[0].weight.shape == (4, 3)


def test_an_offset_beyond_the_tables_is_refused() -> None:
    with pytest.raises(regard.RegardError, match="larger reach"):
        RelativeConvMHA(2, 8, max_rel=4)(torch.randn(1, 5, 8))
    RelativeConvMHA(2, 8, max_rel=5)(torch.randn(1, 5, 8))
