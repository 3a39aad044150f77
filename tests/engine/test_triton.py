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
from regard import Padding, Segments
from regard.algebra import Input, Modified
def biased(name, shape):
    space = {{}}
    exec(f"def move(s, {{name}}): return s + {{name}}", space)
    return Weighted(position=Modified(space["move"], (Input(name, shape),)))
def near(b, h, i, j):
    return (j <= i) & (i - j < 24)
CASES = {cases}
for mechanism, mask in CASES:
    q, k, v = (torch.randn(1, h, n, d, requires_grad=True) for h, n, d in ((2, 70, 8), (1, 70, 8), (1, 70, 6)))
    made = dict(sink=torch.rand(2), slopes=torch.rand(2), temperature=1 + torch.rand(2), alpha=1.2 + torch.rand(2) / 2)
    made |= dict(per_pair=torch.randn(1, 2, 70, 70), per_key=torch.randn(1, 70), per_query=torch.randn(1, 1, 70))
    masks = dict(keep=(torch.arange(70) % 9 > 1)[None], segments=(torch.arange(70) > 31).long()[None])
    inputs = {{item.name: made[item.name].clone().requires_grad_() for item in mechanism.declared if item.name in made}}
    of_mask = {{item.name: masks[item.name] for part in regard.algebra.as_mask(mask).parts() for item in getattr(part, "inputs", ())}}
    if {few}:
        q, k, v = (torch.randn(1, h, n, d, requires_grad=True) for h, n, d in ((2, 3, 8), (1, 600, 8), (1, 600, 6)))
        of_mask = {{name: torch.arange(600)[None] < 333 for name in of_mask}}
    results = []
    for executor in ("triton", "reference"):
        out = regard.attend(q, k, v, mechanism, mask=mask, executor=executor, **inputs, **of_mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, *inputs.values()))))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 2e-5 * max(1.0, float(b.abs().max())), (mechanism, mask, (a - b).abs().max())
print("equal", len(CASES))
"""

CASES = {
    "softplus by a user": "[(Weighted(normalizer=F.softplus, mask=near), None)]",
    "shifts": '[(Weighted(), Causal()), (regard.get("softpick"), Causal()), (regard.get("cog-attention"), None)]',
    "inputs": "[(Weighted(normalizer=softmax_plus()), Causal()), (Weighted(score=Cosine()), None), (Weighted(position=regard.Alibi()), Causal())]",
    "unnormalised": '[(regard.get("sigmoid"), Causal()), (regard.get("relu"), Causal() & (Window(9) | Sinks(2)))]',
    "roots": '[(regard.get("sparsemax"), Causal()), (regard.get("entmax"), None), (regard.get("entmax", alpha=1.5), Causal() & Window(9))]',
    "masks with tensors": "[(Weighted(), Padding()), (regard.get('softpick'), Causal() & Segments()), (regard.get('sparsemax'), Causal() & Padding())]",
    "inputs of pairs, keys and queries": "[(biased('per_pair', 'bhqk'), None), (biased('per_key', 'bk'), Causal()), (biased('per_query', 'bhq'), Causal())]",
    "few queries, keys in parts": "[(Weighted(), Causal()), (regard.get('softpick'), Padding()), (regard.get('sigmoid'), Causal() & Window(40))]",
    "blocks": "[(Weighted(), Neighborhood((7, 10), (3, 5), (1, 2))), (Weighted(), Causal() & Window(20))]",
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_reference(name):
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(cases=CASES[name], few="few" in name)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "equal" in done.stdout


COMPILE = """
import regard
from regard import Causal, Segments, Weighted
from regard.algebra import softmax_plus
from regard.engine.kernels import declared_sides
from regard.engine.triton.generate import compiled, generate
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
SIZES = dict(HEADS=8, GROUP=2, BLOCK_M=64, BLOCK_N=64, D=64, DV=64, D_PAD=64, DV_PAD=64, SPLITS=4)
CASES = {cases}
for mechanism, mask, wrt in CASES:
    kernels = compiled(generate(mechanism, mask, declared_sides(mechanism, mask), wrt))
    for name in ("forward", "backward_dq", "backward_dkv"):
        names = kernels[name].arg_names
        kinds = {{n: "constexpr" if n in SIZES else "*bf16" if n in ("Q", "K", "V", "DO") else "*i32" if n in ("Lists", "Lengths") else
                  "*fp32" if n[0].isupper() and n not in ("Lq", "Lk") or n.endswith(("_at", "_to")) else "i32" for n in names}}
        made = compile(ASTSource(fn=kernels[name], signature=kinds, constexprs={{n: x for n, x in SIZES.items() if n in names}}), target=GPUTarget("cuda", 90, 32))
        assert "cubin" in made.asm
print("compiled", len(CASES))
"""

TO_COMPILE = {
    "softmax and a learned sink": '[(Weighted(), Causal(), ()), (Weighted(normalizer=softmax_plus()), Causal(), ("sink",))]',
    "entmax with a learned alpha, packed": '[(regard.get("entmax"), Causal() & Segments(), ("alpha",))]',
}


@pytest.mark.parametrize("name", TO_COMPILE)
def test_kernels_compile_for_a_gpu_that_is_not_here(name, tmp_path):
    """The interpreter accepts more than the compiler does: types that change in a loop, for one."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.format(cases=TO_COMPILE[name])], env=env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "compiled" in done.stdout


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
