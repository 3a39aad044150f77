"""Standard, optimised, efficient and super attention in loops: causal, padded, across sequences, with biases, step by step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from regard import RegardError
from regard.zoo.softmax.super_attention import FrugalAttention


@torch.no_grad()
def by_hand(layer: FrugalAttention, x: Tensor, source: Tensor, value: Tensor, keep: Tensor | None = None) -> Tensor:
    """One sample, a head and a query at a time."""
    q = layer.q(x)
    k = source if layer.kind in ("efficient", "super") else layer.k(source)  # type: ignore[misc]
    v = layer.v(value) if layer.kind == "standard" else value  # type: ignore[misc]
    n, m, width = len(x), len(source), x.shape[1] // layer.heads
    kept = torch.ones(m, dtype=torch.bool) if keep is None else keep
    if layer.kind == "super":
        mixed = torch.zeros_like(v)
        for i in range(m):
            for j in range(i + 1 if layer.causal else m):
                if kept[j]:
                    mixed[i] += layer.mix[i, j] * v[j]  # type: ignore[index]
            mixed[i] += 0.0 if layer.mix_bias is None else layer.mix_bias[i]
        v = mixed
    out = torch.zeros_like(x)
    for h in range(layer.heads):
        own = slice(h * width, (h + 1) * width)
        for i in range(n):
            seen = [j for j in range(m) if kept[j] and (not layer.causal or j <= i + m - n)]
            p = torch.stack([q[i, own] @ k[j, own] / math.sqrt(width) for j in seen]).softmax(0)
            out[i, own] = p @ v[seen][:, own]
    return layer.out(out)


def made(kind: str, **options: object) -> FrugalAttention:
    layer = FrugalAttention(12, 3, kind, **({"length": 9} | options if kind == "super" else options)).double()  # type: ignore[arg-type]
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return layer


KINDS = ["standard", "optimised", "efficient", "super"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_layer(kind: str, causal: bool) -> None:
    for bias in (False, True):
        layer = made(kind, causal=causal, bias=bias, **({"mix_bias": bias} if kind == "super" else {}))
        x = torch.randn(2, 8, 12, dtype=torch.float64)
        torch.testing.assert_close(layer(x), torch.stack([by_hand(layer, one, one, one) for one in x]))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_never_reaches_an_output(kind: str) -> None:
    for causal in (False, True):
        layer, x = made(kind, causal=causal), torch.randn(2, 8, 12, dtype=torch.float64)
        keep = torch.tensor([[True] * 6 + [False] * 2, [True] * 8])
        other = torch.where(keep[..., None], x, 7.0)
        want = torch.stack([by_hand(layer, one, one, one, kept) for one, kept in zip(x, keep, strict=True)])
        for given in (x, other):
            found = layer(given, keep=keep)
            torch.testing.assert_close(found[keep], want[keep])


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_of_other_sequences(kind: str) -> None:
    layer = made(kind)
    x, context, value = torch.randn(1, 5, 12, dtype=torch.float64), *(torch.randn(1, 8, 12, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(layer(x, context)[0], by_hand(layer, x[0], context[0], context[0]))
    torch.testing.assert_close(layer(x, context, value=value)[0], by_hand(layer, x[0], context[0], value[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_steps(kind: str) -> None:
    layer, x = made(kind, causal=True, **({"mix_bias": True} if kind == "super" else {})), torch.randn(2, 9, 12, dtype=torch.float64)
    state, outs = None, []
    for a, b in ((0, 1), (1, 4), (4, 9)):
        y, state = layer.step(x[:, a:b], state)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), layer(x))
    assert state is not None and state[1].shape[1] == (9 if kind == "super" else 0)


def test_starts() -> None:
    assert torch.equal(FrugalAttention(12, 3, length=9, start="eye").mix, torch.eye(9))  # type: ignore[arg-type]
    drawn = FrugalAttention(12, 3, length=50).mix
    assert drawn is not None and 0.9 * math.sqrt(6 / 100) < float(drawn.detach().abs().max()) <= math.sqrt(6 / 100)
    assert FrugalAttention(12, 3, length=9).mix_bias is None and FrugalAttention(12, 3, length=9).q.bias is None
    assert bool((FrugalAttention(12, 3, length=9, mix_bias=True).mix_bias == 0).all())
    assert FrugalAttention(12, 3, length=9).kind == "super" and not FrugalAttention(12, 3, length=9).causal


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FrugalAttention(12, 3, "frugal"), "kind='frugal'"),
        (lambda: FrugalAttention(12, 3, "super", length=9, start="ones"), "start"),
        (lambda: FrugalAttention(12, 3, "optimised", mix_bias=True), "mixes no positions"),
        (lambda: FrugalAttention(12, 3, "efficient").step(torch.ones(1, 1, 12)), "causal=True"),
        (lambda: FrugalAttention(12, 3, length=4)(torch.ones(1, 5, 12)), "mixes length=4"),
        (
            lambda: FrugalAttention(12, 3, "efficient")(torch.ones(1, 5, 12), torch.ones(1, 4, 12), value=torch.ones(1, 3, 12)),
            "value has shape",
        ),
    ],
)
def test_says_what_is_wrong(make: object, words: str) -> None:
    with pytest.raises(RegardError, match=words):
        make()  # type: ignore[operator]
    assert FrugalAttention(12, 3, length=5)(torch.ones(1, 5, 12)).shape == (1, 5, 12)
