"""The generated kernels under Triton's interpreter, against the reference. The interpreter must be chosen before triton loads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform; the Linux CI runs these tests")

SCRIPT = """
import torch, torch.nn.functional as F, regard
from regard import Causal, Cosine, Neighborhood, RowLocal, Sinks, Weighted, Window
from regard.algebra import softmax_plus
torch.manual_seed(0)
def near(b, h, i, j):
    return (j <= i) & (i - j < 24)
CASES = {cases}
for mechanism, mask in CASES:
    q, k, v = (torch.randn(1, h, n, d, requires_grad=True) for h, n, d in ((2, 70, 8), (1, 70, 8), (1, 70, 6)))
    made = dict(sink=torch.rand(2), slopes=torch.rand(2), temperature=1 + torch.rand(2))
    inputs = {{item.name: made[item.name] for item in mechanism.declared if item.name in made}}
    results = []
    for executor in ("triton", "reference"):
        out = regard.attend(q, k, v, mechanism, mask=mask, executor=executor, **inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 2e-5 * max(1.0, float(b.abs().max())), (mechanism, mask, (a - b).abs().max())
print("equal", len(CASES))
"""

CASES = {
    "softplus by a user": "[(Weighted(normalizer=F.softplus, mask=near), None)]",
    "shifts": '[(Weighted(), Causal()), (regard.get("softpick"), Causal()), (regard.get("cog-attention"), None)]',
    "inputs": "[(Weighted(normalizer=softmax_plus()), Causal()), (Weighted(score=Cosine()), None), (Weighted(position=regard.Alibi()), Causal())]",
    "unnormalised": '[(regard.get("sigmoid"), Causal()), (regard.get("relu"), Causal() & (Window(9) | Sinks(2)))]',
    "blocks": "[(Weighted(), Neighborhood((7, 10), (3, 5), (1, 2))), (Weighted(), Causal() & Window(20))]",
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_reference(name):
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(cases=CASES[name])], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "equal" in done.stdout


def test_source_is_readable_and_comes_from_the_functions():
    import torch

    import regard

    q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
    source = regard.plan(q, k, v, "softpick", mask=regard.Causal(), source=True).source
    assert "def forward(" in source and "def backward_dq(" in source and "tl.exp" in source and "(j <= i)" in source


def test_untraceable_functions_are_named():
    import torch

    from regard.engine.symbolic import Untraceable, trace, var

    with pytest.raises(Untraceable, match="erfc"):
        trace(lambda s: s.erfc(), [var("s")], {})
    with pytest.raises(Untraceable, match="cannot be traced"):
        trace(lambda s: s if s > 0 else torch.exp(s), [var("s")], {})


def test_custom_operator_has_a_fake():
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    import regard.engine.kernels  # noqa: F401

    with FakeTensorMode():
        q, k, v = (torch.empty(1, 2, 16, 8) for _ in range(3))
        out, total, shift = torch.ops.regard.weighted(q, k, v, [torch.empty(1, 1, 1, 1, dtype=torch.int32)], [], 0)
    assert out.shape == (1, 2, 16, 8) and total.shape == shift.shape == (1, 2, 16, 1)
