"""What a mask hides changes nothing: every name under every kind of mask it takes, alone and as the mixer of a decoder."""

from __future__ import annotations

import pytest
import torch
from samples import NAMES, sample
from torch import Tensor

import regard
from regard import Causal, Padding, RegardError, Segments, Window
from regard.nn.mixers import mixer, mixer_names

LENGTH, CUT = 29, 17
# Policies for prompts: later queries and keys may move what is chosen (their papers say so), but no later value is ever read.
CHOOSES_AHEAD = (
    "delta-attention",
    "dhsa",
    "flexprefill",
    "hip",
    "hyperattention",
    "pbs-attn",
    "proxyattn",
    "psa",
    "routing-transformer",
    "sampleattention",
    "spargeattn",
)
PAST, FUTURE = slice(0, CUT), slice(CUT, LENGTH)


def masks() -> dict[str, tuple[dict[str, object], slice, slice]]:
    """Options of a call, the tokens that are changed, and the queries that must not notice."""
    table = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    ids = (torch.arange(LENGTH) >= CUT).long()[None].expand(2, -1)
    left, right = (torch.arange(LENGTH)[None].expand(2, -1) >= 9), (torch.arange(LENGTH)[None].expand(2, -1) < CUT)
    return {
        "causal": ({"mask": Causal()}, FUTURE, PAST),
        "window": ({"mask": Causal() & Window(7)}, FUTURE, PAST),
        "behind a window": ({"mask": Causal() & Window(7)}, slice(0, 5), slice(12, LENGTH)),
        "table": ({"mask": table}, FUTURE, PAST),
        "scores": ({"mask": torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(~table, float("-inf"))}, FUTURE, PAST),
        "function": ({"mask": lambda b, h, i, j: j <= i}, FUTURE, PAST),
        "second document": ({"mask": Segments(), "segments": ids}, FUTURE, PAST),
        "first document": ({"mask": Causal() & Segments(), "segments": ids}, PAST, FUTURE),
        "left padding": ({"mask": Causal() & Padding(), "keep": left}, slice(0, 9), slice(9, LENGTH)),
        "right padding": ({"mask": Padding(), "keep": right}, FUTURE, PAST),
    }


def changed(x: Tensor, where: slice, seed: int) -> Tensor:
    fresh = torch.randn(x[:, :, where].shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    out = x.clone()
    out[:, :, where] = torch.nn.functional.normalize(fresh, dim=-1)
    return out


@pytest.mark.parametrize("case", masks())
@pytest.mark.parametrize("name", NAMES)
def test_alone(name, case):
    options, where, unmoved = masks()[case]
    call, other = sample(name, q_len=LENGTH), sample(name, q_len=LENGTH)
    try:
        out = call.run(**options)
    except RegardError:
        return  # said clearly, before anything is computed
    other.v = changed(call.v, where, 1)
    if name == "sinkformer" and "padding" in case:
        return  # as released, padded queries take their share of the columns; a mask of pairs hides them (see its vectors)
    whole_blocks = name == "moba" and case == "behind a window"  # a block's mean is of all its keys
    if (name not in CHOOSES_AHEAD or "padding" in case or "document" in case) and not whole_blocks:
        other.k, other.q = changed(call.k, where, 2), changed(call.q, where, 3)
    assert torch.isfinite(out).all()
    gap = (other.run(**options) - out)[:, :, unmoved].abs().max()
    assert float(gap) <= 1e-10 * max(1.0, float(out.abs().max()))


@pytest.mark.parametrize("name", [*mixer_names(), *NAMES])
def test_as_a_mixer(name):
    torch.manual_seed(0)
    try:
        layer = mixer(name, 16, 2).eval().double()
    except RegardError as error:
        assert "causal" in str(error) or "whole" in str(error) or "fixed size" in str(error)
        return
    x = torch.randn(2, LENGTH, 16, dtype=torch.float64)
    y = torch.cat((x[:, PAST], torch.randn(2, LENGTH - CUT, 16, dtype=torch.float64)), 1)
    outs = []
    with torch.no_grad():
        for tokens in (x, y):
            out = layer(tokens)
            outs.append(out[0] if isinstance(out, tuple) else out)
    assert float((outs[0] - outs[1])[:, PAST].abs().max()) <= 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_causal_false_is_no_silent_causality(name):
    """A layer that is told to read all keys reads later ones, or refuses; `past_alone` says which policies for prompts never do."""
    torch.manual_seed(0)
    try:
        layer = regard.nn.Attention(16, 2, name, causal=False).double()
        x = torch.randn(1, 16, 16, dtype=torch.float64, requires_grad=True)
        out = layer(x)
    except RegardError:
        return
    (grad,) = torch.autograd.grad(out[:, 0].sum(), x)
    assert bool(grad[:, 8:].any()) != layer.mechanism.past_alone
