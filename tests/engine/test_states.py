"""States as arguments: every recurrence goes on from what it returned, and calls under autocast."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.algebra import LogLinear, Recurrent, Slots
from regard.catalog.registry import entries
from regard.engine.composed import inputs_of

MECHANISMS = [name for name, entry in entries().items() if entry.kind == "mechanism"]
RECURRENCES = [name for name in MECHANISMS if isinstance(regard.get(name), (Recurrent, Slots, LogLinear))]


def sample(name: str, length: int) -> dict[str, torch.Tensor]:
    """Inputs without a default, by the meaning of their names."""
    shapes = {"b": 2, "h": 2, "k": length, "q": length, "d": 4, "e": 4, "f": 8}
    given = {}
    for item in inputs_of(regard.get(name)):
        if item.default is None or item.name == "write":
            x = torch.rand([shapes[letter] for letter in item.shape], dtype=torch.float64) + 0.1
            given[item.name] = -x if item.name.startswith("log_") else x
    return given


def cut(given: dict[str, torch.Tensor], name: str, part: slice) -> dict[str, torch.Tensor]:
    along = {item.name: item.shape.find("k") for item in inputs_of(regard.get(name))}
    return {key: x if along[key] < 0 else x.narrow(along[key], part.start, part.stop - part.start) for key, x in given.items()}


@pytest.mark.parametrize("name", RECURRENCES)
def test_a_call_goes_on_from_the_state_of_another(name: str) -> None:
    q, k, v = (torch.randn(2, 2, 11, 4, dtype=torch.float64) for _ in range(3))
    given = sample(name, 11)
    try:
        want = regard.attend(q, k, v, name, mask=regard.Causal(), **given)
        outs, state = [], None
        for part in (slice(0, 6), slice(6, 7), slice(7, 11)):
            of = [x[:, :, part] for x in (q, k, v)]
            out, state = regard.attend(*of, name, mask=regard.Causal(), state=state, return_state=True, **cut(given, name, part))
            outs.append(out)
    except regard.RegardError as refused:
        assert any(word in str(refused) for word in ("causal", "length", "whole sequence", "Causal"))
        return
    torch.testing.assert_close(torch.cat(outs, 2), want, rtol=1e-9, atol=1e-9)


def test_a_first_state_is_what_earlier_tokens_leave() -> None:
    """S_t from a sum over tokens, written out."""
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    s = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    decay = -torch.rand(1, 2, 5, 4, dtype=torch.float64)
    out, state = regard.attend(q, k, v, "gla", log_decay=decay, state=s, return_state=True)
    for t in range(5):
        s = decay[:, :, t, :, None].exp() * s + k[:, :, t, :, None] * v[:, :, t, None]
        torch.testing.assert_close(out[:, :, t], (q[:, :, t, None] @ s)[..., 0, :] / 2)
    torch.testing.assert_close(state.s, s)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"state": torch.zeros(1, 2, 4, 3)}, "state has shape"),
        ({"mask": regard.Padding(), "return_state": True}, "expected mask=Causal"),
        ({"executor": "chunk", "return_state": True}, "executor"),
    ],
)
def test_states_that_do_not_fit_are_refused(change: dict[str, object], match: str) -> None:
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(regard.RegardError, match=match):
        regard.attend(q, q, q, "gla", log_decay=-torch.rand(1, 2, 5, 4), **change)


@pytest.mark.parametrize("name", MECHANISMS)
def test_layers_under_autocast(name: str) -> None:
    """Whatever runs in float32 runs under bfloat16 autocast, forward, backward and in steps, near the float32 numbers."""
    steep = {"cog-attention", "routing-transformer"}  # a sign, or a choice of clusters, flips with the rounding of a score
    for causal in (True, False):
        torch.manual_seed(0)
        x = torch.randn(2, 9, 32)
        try:
            layer = regard.nn.Attention(32, 4, name, causal=causal, rope=True)
            want = layer(x)
        except (regard.RegardError, TypeError):
            continue
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x)
            if causal:
                with torch.no_grad():
                    layer.step(x[:, 4:], layer.step(x[:, :4])[1])
        out.float().square().sum().backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in layer.parameters())
        off = float((out.float() - want).abs().max() / want.abs().max())
        assert off < 0.15 or name in steep
