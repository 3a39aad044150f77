"""Chunked softmax attention against the formula, with masks, biases and scales; one query over a stream of keys."""

from __future__ import annotations

import math

import pytest
import torch

import regard
from regard.zoo.softmax.memory_efficient_attention import LazySoftmax, memory_efficient_attention


@pytest.mark.parametrize("shape", [(), (9,), (7, 9), (2, 1, 9), (3, 2, 7, 9)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_biases_and_scales(shape: tuple[int, ...], scale: float | None) -> None:
    q, k, v = torch.randn(3, 2, 7, 4, dtype=torch.float64), *(torch.randn(3, 2, 9, 4, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    want = (q @ k.mT * (scale or 0.5) + bias).softmax(-1) @ v
    found = memory_efficient_attention(q, k, v, None, bias, q_chunk=3, k_chunk=4, **({} if scale is None else {"scale": scale}))
    torch.testing.assert_close(found, want)
    grads = [torch.autograd.grad(y.square().sum(), bias, retain_graph=True)[0] for y in (found, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("mask", ["causal", "function", "window"])
def test_masks(mask: str) -> None:
    q, k, v = torch.randn(1, 2, 7, 4, dtype=torch.float64), *(torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(2))
    i, j = torch.arange(2, 9)[:, None], torch.arange(9)
    seen = {"causal": j <= i, "function": (i + j) % 3 > 0, "window": (j <= i) & (i - j < 3)}[mask]
    given = {"causal": regard.Causal(), "function": lambda b, h, i, j: (i + j) % 3 > 0, "window": regard.Causal() & regard.Window(3)}[mask]
    want = (q @ k.mT / 2).masked_fill(~seen, -math.inf).softmax(-1) @ v
    torch.testing.assert_close(memory_efficient_attention(q, k, v, given), want)
    torch.testing.assert_close(memory_efficient_attention(q, k, v, given, q_chunk=1, k_chunk=1), want)


@pytest.mark.parametrize("shape", [(), (3, 2)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_one_query_over_a_stream(shape: tuple[int, ...], scale: float | None) -> None:
    q, k, v = (
        torch.randn(*shape, 4, dtype=torch.float64),
        torch.randn(9, *shape, 4, dtype=torch.float64),
        torch.randn(9, *shape, 5, dtype=torch.float64),
    )
    lazy = LazySoftmax(q) if scale is None else LazySoftmax(q, scale)
    for n in range(9):
        lazy.update(k[n], v[n])
        p = ((k[: n + 1] * q).sum(-1) * (scale or 0.5)).softmax(0)
        torch.testing.assert_close(lazy.value(), (p[..., None] * v[: n + 1]).sum(0))


def test_default_chunks_hold_a_thousand_queries_by_four_thousand_keys() -> None:
    from regard.lab.memory import largest_tensor

    q, k, v = torch.randn(1, 1, 2048, 4), *(torch.randn(1, 1, 8192, 4) for _ in range(2))
    assert 1024 * 4096 <= largest_tensor(lambda: memory_efficient_attention(q, k, v)) <= 1.1 * 1024 * 4096


def test_says_what_is_wrong() -> None:
    x = torch.ones(1, 1, 2, 4)
    for wrong in ({"q_chunk": 0}, {"k_chunk": 0}):
        with pytest.raises(regard.RegardError, match="positive integers"):
            memory_efficient_attention(x, x, x, **wrong)
    with pytest.raises(regard.RegardError, match="call update"):
        LazySoftmax(torch.ones(4)).value()
