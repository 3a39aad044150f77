"""Multi-token attention: the whole layer against loops over heads, queries, keys and offsets; its parts by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from regard import RegardError
from regard.zoo.softmax.mta import HeadMix, KeyQueryConv, MultiTokenAttention, find_block


def scrambled(**options: object) -> MultiTokenAttention:
    layer = MultiTokenAttention(12, 4, 3, 5, **options).double()  # type: ignore[arg-type]
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def convolved(s: Tensor, theta: Tensor, left: int) -> Tensor:
    """sum_ab theta_ab s_(i-a)(j+b), the keys from `left` before j on; zeros outside."""
    n, (rows, columns) = len(s), theta.shape
    out = torch.zeros_like(s)
    for i in range(n):
        for j in range(n):
            for a in range(min(rows, i + 1)):
                for c in range(columns):
                    if 0 <= j + c - left < n:
                        out[i, j] += theta[rows - 1 - a, c] * s[i - a, j + c - left]
    return out


def mixed(maps: list[Tensor], weight: Tensor) -> list[Tensor]:
    """out_f = sum_h W_fh in_h in groups."""
    size = weight.shape[-1]
    return [sum(weight[f // size, f % size, h] * maps[f // size * size + h] for h in range(size)) for f in range(len(maps))]


@torch.no_grad()
def by_hand(layer: MultiTokenAttention, x: Tensor, eps: float, factor: float, left: int = 2) -> Tensor:
    n, heads, group = x.shape[0], layer.heads, layer.heads // layer.kv_heads
    q, k, v = (w.weight @ x.T for w in (layer.q, layer.k, layer.v))
    d = len(q) // heads
    past = torch.ones(n, n, dtype=torch.bool).tril()
    cut = [slice(d * h, d * h + d) for h in range(heads)]
    maps = [torch.where(past, q[cut[h]].T @ k[cut[h // group]] / math.sqrt(d), 0.0) for h in range(heads)]
    if isinstance(layer.pre, KeyQueryConv):
        maps = [convolved(s, layer.pre.weight[h, 0], left) for h, s in enumerate(maps)]
    if isinstance(layer.pre_mix, HeadMix):
        maps = mixed(maps, layer.pre_mix.weight)
    maps = [s.masked_fill(~past, -math.inf).softmax(-1) for s in maps]
    if isinstance(layer.post, KeyQueryConv):
        maps = [torch.where(past, convolved(p, layer.post.weight[h, 0], left), 0.0) for h, p in enumerate(maps)]
    if isinstance(layer.post_mix, HeadMix):
        maps = mixed(maps, layer.post_mix.weight)
    outs = []
    for h, p in enumerate(maps):
        o = p @ v[cut[h // group]].T
        if isinstance(layer.norm, nn.RMSNorm):
            o = layer.norm.weight * o / (o.square().mean(-1, keepdim=True) + eps).sqrt()
        o = factor * o
        if layer.gate is not None:
            o = o / (1 + torch.exp(-(o @ layer.gate.weight.T + layer.gate.bias)))
        outs.append(o)
    return torch.cat(outs, -1) @ layer.out.weight.T


@pytest.mark.parametrize(
    ("options", "eps", "factor"),
    [
        ({}, 1e-5, 1.0),
        ({"depth": 3, "gate": "full", "post_mix": 2}, 1e-5, 1 - (0.8 - 0.6 * math.exp(-0.9))),
        ({"depth": 0, "norm_eps": 0.3, "pre_mix": 2, "kv_heads": 2}, 0.3, 0.8),
        ({"convolve": "pre", "norm": False, "pre_mix": 0}, 0.0, 1.0),
        ({"convolve": "post", "gate": False, "post_mix": 0, "head_dim": 5}, 1e-5, 1.0),
        ({"convolve": False, "post_queries": 2}, 1e-5, 1.0),
    ],
)
def test_the_layer(options: dict[str, object], eps: float, factor: float) -> None:
    layer, x = scrambled(**options), torch.randn(1, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], by_hand(layer, x[0], eps, factor))


def test_keys_to_the_left_and_sizes_of_their_own_after_softmax() -> None:
    layer, x = scrambled(side="left"), torch.randn(1, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], by_hand(layer, x[0], 1e-5, 1.0, left=4))
    other = scrambled(post_queries=2, post_keys=3)
    assert other.post.weight.shape == (4, 1, 2, 3) and other.pre.weight.shape == (4, 1, 3, 5)


@pytest.mark.parametrize("side", ["both", "left"])
def test_a_new_layer_is_softmax_attention_and_blocks_of_rows_change_nothing(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = MultiTokenAttention(12, 4, 3, 5, side=side).double(), torch.randn(2, 21, 12, dtype=torch.float64)
    q, k, v = layer.heads_of(x, 0)
    torch.testing.assert_close(layer(x), layer.close(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)))
    wild = scrambled(side=side, rope=True, head_dim=4)
    whole = wild(x)
    (want,) = torch.autograd.grad(whole.square().sum(), wild.q.weight)
    monkeypatch.setattr("regard.zoo.softmax.mta.ROWS", 4)
    torch.testing.assert_close(wild(x), whole)
    torch.testing.assert_close(torch.autograd.grad(wild(x).square().sum(), wild.q.weight)[0], want)


@pytest.mark.parametrize("convolve", [True, "pre", "post", False])
def test_the_cache_keeps_the_queries_that_convolutions_reach(convolve: bool | str) -> None:
    layer, x = scrambled(convolve=convolve, rope=True, head_dim=4), torch.randn(2, 13, 12, dtype=torch.float64)
    state, outs = None, []
    for a, b in ((0, 1), (1, 4), (4, 5), (5, 13)):
        y, state = layer.step(x[:, a:b], state)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), layer(x))
    assert state is not None and state.q.shape[2] == {True: 4, "pre": 2, "post": 2, False: 0}[convolve] and state.length == 13


def test_packed_documents_of_several_samples() -> None:
    layer, x = scrambled(), torch.randn(2, 9, 12, dtype=torch.float64)
    ids = torch.tensor([[0] * 4 + [1] * 5, [3] * 2 + [4] * 6 + [5]])
    want = [torch.cat([layer(part) for part in x[b : b + 1].split(cut, 1)], 1) for b, cut in ((0, [4, 5]), (1, [2, 6, 1]))]
    torch.testing.assert_close(layer(x, documents=ids), torch.cat(want))


def test_the_toy_task() -> None:
    tokens, answers = find_block(40, blocks=4, size=3, asked=2, letters=9)
    again, _ = find_block(40, blocks=4, size=3, asked=2, letters=9)
    assert tokens.shape == (40, 4 * 4 + 2) and torch.equal(tokens, again) and set(answers.tolist()) == {0, 1, 2, 3}
    for row, answer in zip(tokens.tolist(), answers.tolist(), strict=True):
        blocks, asked = [row[4 * n : 4 * n + 3] for n in range(4)], row[16:]
        assert all(row[4 * n + 3] == 9 for n in range(4)) and len(set(asked)) == 2
        assert [n for n in range(4) if set(asked) <= set(blocks[n])] == [answer]
    plain, wanted = find_block(4), find_block(4, blocks=6, size=5, asked=2, letters=26, seed=0)
    assert torch.equal(plain[0], wanted[0]) and torch.equal(plain[1], wanted[1])
    assert not torch.equal(find_block(40, seed=1)[0], find_block(40)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 10, "heads": 4}, "head_dim"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"convolve": "both"}, "convolve"),
        ({"gate": "half"}, "gate"),
        ({"keys": 4}, "odd"),
        ({"queries": 0}, "positive"),
        ({"side": "right"}, "side"),
        ({"post_mix": 3}, "multiple of head groups"),
    ],
)
def test_says_what_is_wrong(options: dict[str, object], words: str) -> None:
    with pytest.raises(RegardError, match=words):
        MultiTokenAttention(**({"dim": 12, "heads": 4} | options))  # type: ignore[arg-type]
