"""Errors name the argument, what came and what was expected."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regard
from regard import RegardError


def t(*shape, **options):
    return torch.randn(*shape, **options)


CASES = [
    (lambda: regard.attend(t(4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8)), "k is a tensor of shape"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 3, 8, 8), t(1, 3, 8, 8)), "multiple"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 9, 8), t(1, 4, 8, 8)), "same heads and length"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 6), t(1, 4, 8, 8)), "head_dim"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(2, 4, 8, 8), t(2, 4, 8, 8)), "batch sizes"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 8).double(), t(1, 4, 8, 8)), "dtype"),
    (lambda: regard.attend(torch.ones(1, 4, 8, 8).long(), t(1, 4, 8, 8), t(1, 4, 8, 8)), "floating"),
    (lambda: regard.attend(t(1, 4, 8, 0), t(1, 4, 8, 0), t(1, 4, 8, 8)), "at least one channel"),
    (lambda: regard.attend([1], t(1, 4, 8, 8), t(1, 4, 8, 8)), "q is list"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), "softmx"), "Did you mean softmax"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), "attention-surgery"), "planned"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), 3), "expected a name"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), "softmax", beta=t(4)), "unknown input 'beta'"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), "deltanet"), "'beta' is missing"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), "deltanet", beta=t(1, 4, 9)), "input 'beta' has shape"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), "gla", log_decay=t(1, 4, 8, 8).abs()), "expected logs of decays"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), mask=t(8, 8).long()), "expected bool"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), mask=torch.ones(8, 9) > 0), "'visible' has shape"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), mask="causal"), "mask is str"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), "softpick", executor="sdpa"), "only softmax"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), "softpick", executor="fast"), "expected one of"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), "based", mask=regard.Window(3)), "Causal"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), "based", scale=2.0), "fixes its own scale"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), "qknorm", scale=2.0), "have no scale"),
    (lambda: regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), "soft", mask=regard.Causal()), "expected no mask"),
    (lambda: regard.step(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), "soft"), "cannot decode"),
    (lambda: regard.step(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), "cosformer"), "pass horizon"),
    (lambda: regard.get("moba", block=3), "Did you mean block_size"),
    (lambda: regard.get("moba", block_size=0), "positive integer"),
    (lambda: regard.get("set-transformer"), "not a mechanism"),
    (lambda: regard.get("entmax", alpha=1.0), "above 1"),
    (lambda: regard.RowLocal(torch.exp, shift="mx"), "expected one of"),
    (lambda: regard.Weighted(normalizer=regard.RowLocal(lambda s, heat: s * heat)), None),
    (lambda: regard.nn.Attention(10, 4), "multiple of heads"),
    (lambda: regard.nn.Attention(16, 4, "soft"), "causal=False"),
    (lambda: regard.nn.Attention(16, 4)(t(2, 5, 8)), "expected"),
    (lambda: regard.records("softmx"), "expected one of"),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_message(case):
    call, words = CASES[case]
    if words is None:
        mechanism = call()
        with pytest.raises(RegardError, match="neither an index nor a declared input"):
            regard.attend(t(1, 4, 8, 8), t(1, 4, 8, 8), t(1, 4, 8, 8), mechanism)
        return
    with pytest.raises(RegardError, match=words):
        call()


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 2),
    kv=st.integers(1, 3),
    group=st.integers(1, 2),
    q_len=st.integers(1, 20),
    k_len=st.integers(1, 20),
    d=st.integers(1, 9),
    e=st.integers(1, 9),
)
def test_any_fitting_shape_runs(b, kv, group, q_len, k_len, d, e):
    # float64: where every score of a row is near 0 softpick is a ratio of two cancelled differences
    q, k, v = t(b, kv * group, q_len, d).double(), t(b, kv, k_len, d).double(), t(b, kv, k_len, e).double()
    for name in ("softmax", "softpick", "sparsemax"):
        out = regard.attend(q, k, v, name, mask=regard.Causal())
        assert out.shape == (b, kv * group, q_len, e) and torch.isfinite(out).all()
        assert torch.allclose(out, regard.attend(q, k, v, name, mask=regard.Causal(), executor="reference"), atol=1e-9)
