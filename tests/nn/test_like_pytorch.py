"""The layer and the function that stand in for PyTorch's own: its arguments, shapes, masks and weights."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regard
from regard import RegardError
from regard.nn import MultiheadAttention, scaled_dot_product_attention

F64 = torch.float64
LAYERS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 10, "vdim": 6},
]


def pair(**options):
    theirs = nn.MultiheadAttention(16, 4, dtype=F64, **options)
    ours = MultiheadAttention(16, 4, dtype=F64, **options)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def call_of(name, batch, q_len, k_len):
    """The masks of a call, as PyTorch has them; every query sees a key."""
    padding = torch.rand(batch, k_len) < 0.3
    padding[:, 0] = False
    hidden = torch.rand(q_len, k_len) < 0.3
    hidden[:, 0] = False
    causal = torch.ones(q_len, k_len, dtype=torch.bool).triu(1)
    of_heads = torch.rand(batch * 4, q_len, k_len) < 0.3
    of_heads[..., 0] = False
    return {
        "plain": {},
        "padding": {"key_padding_mask": padding},
        "table": {"attn_mask": hidden},
        "heads": {"attn_mask": of_heads},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "float": {
            "attn_mask": torch.randn(q_len, k_len, dtype=F64),
            "key_padding_mask": torch.zeros(batch, k_len, dtype=F64).masked_fill(padding, -torch.inf),
        },
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal and padding": {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding},
    }[name]


@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("masks", ["plain", "padding", "table", "heads", "both", "float", "causal", "causal and padding"])
def test_layer_equals_pytorch(options, masks):
    for batch_first, k_len in itertools.product((False, True), (7, 5)):
        if "causal" in masks and k_len != 7:
            continue
        theirs, ours = pair(batch_first=batch_first, **options)
        q, k, v = torch.randn(3, 7, 16), torch.randn(3, k_len, options.get("kdim", 16)), torch.randn(3, k_len, options.get("vdim", 16))
        q, k, v = ((x if batch_first else x.transpose(0, 1)).to(F64).requires_grad_() for x in (q, k, v))
        given = call_of(masks, 3, 7, k_len)
        # PyTorch hides the keys that it adds where it takes is_causal at its word (need_weights=False), and shows them where it does not
        hint = masks == "causal" and options.keys() & {"add_bias_kv", "add_zero_attn"}
        last = {} if hint else {"need_weights": False}
        for more in ({}, {"average_attn_weights": False}, last):
            (a, p), (b, r) = theirs(q, k, v, **given, **more), ours(q, k, v, **given, **more)
            torch.testing.assert_close(a, b)
            assert (p is None) == (r is None)
            if p is not None:
                torch.testing.assert_close(p, r)
        grads = [
            torch.autograd.grad(layer(q, k, v, **last, **given)[0].sin().sum(), [q, k, v, *layer.parameters()]) for layer in (theirs, ours)
        ]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)


def test_layer_without_a_batch_and_half_precision():
    theirs, ours = pair()
    x = torch.randn(5, 16, dtype=F64)
    for one, other in zip(theirs(x, x, x), ours(x, x, x), strict=True):
        torch.testing.assert_close(one, other)
    half = MultiheadAttention(16, 4, dtype=torch.bfloat16, batch_first=True)
    assert half(*[torch.randn(2, 5, 16, dtype=torch.bfloat16)] * 3)[0].dtype == torch.bfloat16
    assert MultiheadAttention(16, 4, device="meta").in_proj_weight.is_meta


def test_inside_pytorch_s_encoder_the_mechanism_is_what_runs():
    """The fused encoder layer reads the weights of its attention and computes softmax itself: not here."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 6, 16), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    softmax = encoder(x, src_key_padding_mask=padding)
    for layer in encoder.layers:
        own = MultiheadAttention(16, 4, batch_first=True, mechanism="sigmoid")
        own.load_state_dict(layer.self_attn.state_dict(), strict=False)
        layer.self_attn = own
    with torch.no_grad():
        found = encoder(x, src_key_padding_mask=padding)
    h = x
    for layer in encoder.layers:
        own = layer.self_attn
        q, k, v = (
            F.linear(h, w, b).unflatten(-1, (4, 4)).transpose(1, 2)
            for w, b in zip(own.in_proj_weight.chunk(3), own.in_proj_bias.chunk(3), strict=True)
        )
        s = q @ k.mT / 2 - torch.log((~padding).sum(-1).float())[:, None, None, None]
        o = (s.sigmoid() * ~padding[:, None, None]) @ v
        h = layer.norm1(h + own.out_proj(o.transpose(1, 2).flatten(-2)))
        h = layer.norm2(h + layer.linear2(layer.linear1(h).relu()))
    assert not torch.allclose(found[0], softmax[0], atol=1e-3)
    torch.testing.assert_close(found[0], h[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1, :4], h[1, :4], atol=1e-5, rtol=1e-5)


def test_layer_of_other_mechanisms():
    layer = MultiheadAttention(16, 4, batch_first=True, mechanism="gla")
    x = torch.randn(2, 6, 16)
    y, p = layer(x, x, x, is_causal=True, need_weights=False)
    again = layer(*[torch.cat((x[:, :4], torch.randn(2, 2, 16)), 1)] * 3, is_causal=True, need_weights=False)[0]
    assert p is None
    torch.testing.assert_close(again[:, :4], y[:, :4])
    with pytest.raises(RegardError, match="need_weights=False"):
        MultiheadAttention(16, 4, mechanism="agent-attention")(x, x, x)
    drop = MultiheadAttention(16, 4, 0.5, mechanism="softpick")
    assert not torch.equal(drop(x, x, x)[0], drop(x, x, x)[0])
    assert torch.equal(drop.eval()(x, x, x)[0], drop(x, x, x)[0])


REFUSED = {
    "not a multiple": lambda: MultiheadAttention(16, 3),
    "dropout=1": lambda: MultiheadAttention(16, 4, dropout=1),
    "expected widths": lambda: MultiheadAttention(16, 4)(torch.zeros(3, 1, 8), torch.zeros(3, 1, 16), torch.zeros(3, 1, 16)),
    "key_padding_mask is": lambda: MultiheadAttention(16, 4)(
        *[torch.zeros(3, 1, 16)] * 3, key_padding_mask=torch.zeros(3, 1, dtype=torch.bool)
    ),
    "attn_mask has shape": lambda: MultiheadAttention(16, 4)(*[torch.zeros(3, 1, 16)] * 3, attn_mask=torch.zeros(2, 3)),
    "attn_mask is torch.int64": lambda: MultiheadAttention(16, 4)(
        *[torch.zeros(3, 1, 16)] * 3, attn_mask=torch.zeros(3, 3, dtype=torch.long)
    ),
    "is_causal=True with 3": lambda: MultiheadAttention(16, 4)(torch.zeros(3, 1, 16), *[torch.zeros(2, 1, 16)] * 2, is_causal=True),
    "enable_gqa=True": lambda: scaled_dot_product_attention(torch.zeros(1, 4, 3, 8), *[torch.zeros(1, 2, 3, 8)] * 2),
    "is_causal=True with attn_mask": lambda: scaled_dot_product_attention(
        *[torch.zeros(1, 2, 3, 8)] * 3, torch.zeros(3, 3), is_causal=True
    ),
    "do not broadcast": lambda: scaled_dot_product_attention(torch.zeros(2, 2, 3, 8), *[torch.zeros(3, 2, 3, 8)] * 2),
    "of as many dimensions": lambda: scaled_dot_product_attention(torch.zeros(2, 3, 8), *[torch.zeros(3, 2, 3, 8)] * 2),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused(words):
    with pytest.raises(RegardError, match=words):
        REFUSED[words]()


SHAPES = [
    ((2, 4, 5, 8), (2, 4, 7, 8)),
    ((2, 4, 7, 8), (2, 4, 5, 8)),
    ((3, 5, 8), (3, 6, 8)),
    ((5, 8), (6, 8)),
    ((2, 3, 4, 5, 8), (2, 3, 4, 6, 8)),
    ((2, 4, 5, 8), (1, 4, 6, 8)),
    ((2, 1, 5, 8), (2, 4, 6, 8)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("how", ["plain", "causal", "bool", "float", "scale"])
def test_function_equals_pytorch(shapes, how):
    q, k, v = (torch.randn(*s, dtype=F64).requires_grad_() for s in (shapes[0], shapes[1], (*shapes[1][:-1], 3)))
    seen = torch.rand(shapes[0][-2], shapes[1][-2]) < 0.7
    seen[:, 0] = True
    options = {
        "plain": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": seen},
        "float": {"attn_mask": torch.randn(seen.shape, dtype=F64)},
        "scale": {"scale": 0.3},
    }[how]
    found = [f(q, k, v, **options) for f in (F.scaled_dot_product_attention, scaled_dot_product_attention)]
    torch.testing.assert_close(*found)
    for one, other in zip(*[torch.autograd.grad(y.sin().sum(), (q, k, v)) for y in found], strict=True):
        torch.testing.assert_close(one, other)


def test_function_with_grouped_heads_masks_of_heads_and_mechanisms():
    q, k, v = torch.randn(2, 6, 5, 8, dtype=F64), torch.randn(2, 2, 5, 8, dtype=F64), torch.randn(2, 2, 5, 8, dtype=F64)
    for mask in (None, torch.randn(2, 6, 5, 5, dtype=F64), torch.randn(6, 5, 5, dtype=F64), torch.randn(2, 1, 5, 5, dtype=F64)):
        torch.testing.assert_close(
            scaled_dot_product_attention(q, k, v, mask, enable_gqa=True), F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        )
    mask = torch.randn(5, 6, 6, dtype=F64)  # of the heads of a four-dimensional call; of the batch of a three-dimensional one
    x = torch.randn(5, 6, 8, dtype=F64)
    torch.testing.assert_close(scaled_dot_product_attention(x, x, x, mask), F.scaled_dot_product_attention(x, x, x, mask))
    s = (q @ k.repeat_interleave(3, 1).mT * 8**-0.5).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    up = torch.where(s > -torch.inf, s.exp() - 1, 0.0)
    truth = (up.relu() / up.abs().sum(-1, keepdim=True)) @ v.repeat_interleave(3, 1)
    found = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, mechanism=regard.get("softpick", eps=0.0))
    torch.testing.assert_close(found, truth)
    torch.manual_seed(0)
    rates = scaled_dot_product_attention(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 4096, 4), torch.ones(1, 1, 4096, 4), dropout_p=0.25)
    assert abs(float(rates.mean()) - 1) < 0.05 and not torch.allclose(rates, torch.ones_like(rates))
