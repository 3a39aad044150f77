"""Slots and levels: padding, streams, and masks they refuse."""

import pytest
import torch

import regard
from regard import Causal, Padding


@pytest.mark.parametrize("name, options", [("gsa", {}), ("gsa", {"gates": "sum"}), ("nha", {"window": 8}), ("nha", {"window": 0})])
def test_left_padding_is_not_there(name, options):
    q, k, v = (torch.randn(2, 2, 60, 8, dtype=torch.float64) for _ in range(3))
    gate = -torch.rand(2, 2, 60, 5, dtype=torch.float64)
    inputs = {"write": 4 * gate} if options.get("gates") == "sum" else {"log_forget": gate}
    keep = torch.ones(2, 60, dtype=torch.bool)
    keep[0, :13] = False
    k[0, :, :13] = float("nan")
    mechanism = regard.get(name, **options)
    out = regard.attend(q, k, v, mechanism, mask=Causal() & Padding(), keep=keep, **inputs)
    alone = regard.attend(q[:1, :, 13:], k[:1, :, 13:], v[:1, :, 13:], mechanism, **{n: x[:1, :, 13:] for n, x in inputs.items()})
    assert out.isfinite().all() and float((out[:1, :, 13:] - alone).abs().max()) < 1e-12


def test_spans_refuse_padding_and_too_few_levels():
    q, k, v = (torch.randn(1, 1, 20, 8) for _ in range(3))
    known = {"log_decay": -torch.rand(1, 1, 20), "level_scales": torch.rand(1, 1, 20, 6)}
    with pytest.raises(regard.RegardError, match="spans are counted"):
        regard.attend(q, k, v, "log-linear-attention", mask=Padding(), keep=torch.ones(1, 20, dtype=torch.bool), **known)
    with pytest.raises(regard.RegardError, match="at least 6 levels"):
        regard.attend(q, k, v, "log-linear-attention", **{**known, "level_scales": torch.rand(1, 1, 20, 5)})


def test_streams_of_slots_refuse_masks():
    q, k, v = (torch.randn(1, 1, 3, 8) for _ in range(3))
    with pytest.raises(regard.RegardError, match="reads every token"):
        regard.step(q, k, v, "gsa", mask=regard.Window(4), log_forget=-torch.rand(1, 1, 3, 5))


@pytest.mark.parametrize("options", [{"window": 0}, {"window": 5}, {"gates": "sum"}], ids=str)
def test_streams_of_slots_leave_padding_out(options):
    """Left and inner padding, in a prompt and token by token, against the row alone."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 12, 8, dtype=torch.float64) for _ in range(3))
    name = "write" if "gates" in options else "log_forget"
    gate = torch.randn(2, 2, 12, 5, dtype=torch.float64)
    given = {name: gate if name == "write" else -gate.abs()}
    mechanism = regard.get("gsa", **options) if "gates" in options else regard.get("nha", slots=5, rope=None, **options)
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[1, :3] = False
    whole = regard.attend(q, k, v, mechanism, mask=Causal() & Padding(), keep=keep, **given)
    alone = regard.attend(*(x[1:, :, 3:] for x in (q, k, v)), mechanism, **{n: x[1:, :, 3:] for n, x in given.items()})
    torch.testing.assert_close(whole[1:, :, 3:], alone)
    k[1, :, :3] = v[1, :, :3] = float("nan")
    state, outs = None, []
    for a, b in ((0, 6), (6, 7), (7, 9), (9, 10), (10, 12)):
        cut = [x[:, :, a:b] for x in (q, k, v)]
        out, state = regard.step(*cut, mechanism, state, mask=Padding(), keep=keep[:, :b], **{n: x[:, :, a:b] for n, x in given.items()})
        outs.append(out)
    found = torch.cat(outs, 2)
    torch.testing.assert_close(found[1:, :, 3:], whole[1:, :, 3:])
    torch.testing.assert_close(found[:1], whole[:1])
