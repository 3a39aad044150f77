"""Dropout of attention weights: a share of them is zero, the others are divided by what is kept, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from samples import NAMES, sample

import regard
from regard import Causal, Padding, RegardError, Segments, nn

ALL_SAME = 7  # the seed of a draw


def weights_of(call, mask):
    return regard.weights(call.q, call.k, call.mechanism, mask=mask, **call.inputs)


@pytest.mark.parametrize("name", NAMES)
def test_drops_from_the_weights(name):
    call = sample(name)
    mask = Causal() if call.causal else None
    try:
        torch.manual_seed(ALL_SAME)
        out = call.run(mask=mask, dropout_p=0.4)
    except RegardError as why:
        assert "dropout_p=0.4" in str(why)
        return
    p = weights_of(call, mask)
    torch.manual_seed(ALL_SAME)
    kept = torch.nn.functional.dropout(torch.ones_like(p), 0.4)
    assert 0.2 < float((kept == 0).double().mean()) < 0.6
    v = call.v.repeat_interleave(p.shape[1] // call.v.shape[1], 1)
    truth = torch.einsum("bhij,bhij,bhjd->bhid", p, kept, v)
    assert float((out - truth).abs().max()) < 1e-9
    assert float((call.run(mask=mask) - p @ v).abs().max()) < 1e-8


def test_no_number_of_padding_reaches_a_row():
    q, k, v = (torch.randn(2, 2, 6, 4) for _ in range(3))
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[0, :2] = False
    v[0, :, :2] = float("nan")
    assert regard.attend(q, k, v, mask=Padding(), keep=keep, dropout_p=0.5)[:, :, 2:].isfinite().all()


def test_without_heads():
    q, k, v = (torch.randn(2, 6, 4) for _ in range(3))
    torch.manual_seed(ALL_SAME)
    flat = regard.attend(q, k, v, dropout_p=0.5)
    torch.manual_seed(ALL_SAME)
    assert torch.equal(flat, regard.attend(q[:, None], k[:, None], v[:, None], dropout_p=0.5)[:, 0])


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_refuses_other_shares(rate):
    x = torch.randn(1, 1, 4, 4)
    with pytest.raises(RegardError, match="dropout_p is"):
        regard.attend(x, x, x, dropout_p=rate)
    with pytest.raises(RegardError, match="dropout="):
        nn.Attention(8, 2, dropout=rate)


def test_layer_drops_in_training_alone():
    layer, x = nn.Attention(8, 2, dropout=0.5), torch.randn(1, 6, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    same = nn.Attention(8, 2).eval()
    same.load_state_dict(layer.state_dict())
    assert torch.allclose(layer(x), same(x))


LEFT = torch.ones(2, 29, dtype=torch.bool)
LEFT[0, :7] = False
MASKS = {
    "left padding": (Padding(), {"keep": LEFT}),
    "documents": (Segments(), {"segments": (torch.arange(29) >= 11).long()[None].expand(2, -1)}),
    "a table": (torch.ones(29, 29, dtype=torch.bool).tril() & LEFT[:, None, None], {}),
}


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_each_sequence_alone(name, case):
    """What `attend` gives under padding and in packed documents is what its weights give, and so what dropout drops from."""
    call, (mask, inputs) = sample(name), MASKS[case]
    mask = Causal() & mask if call.causal and not isinstance(mask, torch.Tensor) else mask
    try:
        out = call.run(mask=mask, **inputs)
        p = regard.weights(call.q, call.k, call.mechanism, mask=mask, **{**call.inputs, **inputs})
    except RegardError:
        return
    if p is None:
        return
    live = LEFT if case != "documents" else torch.ones_like(LEFT)
    assert float(((out - p @ call.v).abs() * live[:, None, :, None]).max()) < 1e-8


@pytest.mark.parametrize("sizes", [(0, 4, 4), (1, 0, 4), (1, 4, 0)])
def test_nothing_to_drop(sizes):
    batch, queries, keys = sizes
    q, k, v = torch.randn(batch, 2, queries, 4), torch.randn(batch, 2, keys, 4), torch.randn(batch, 2, keys, 3)
    out = regard.attend(q, k, v, dropout_p=0.5)
    assert out.shape == (batch, 2, queries, 3) and not out.any()


def test_what_is_no_tensor_is_refused():
    x = torch.randn(1, 2, 4, 4)
    with pytest.raises(RegardError, match="q is list"):
        regard.attend([1.0], x, x, dropout_p=0.5)
