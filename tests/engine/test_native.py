"""The compiled kernels against the float64 reference, and what happens where nothing can be compiled."""

import math
import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.algebra import Alibi, Distance, Input, Modified, RowLocal, Selection, Weighted
from regard.algebra.normalizer import softmax_plus
from regard.algebra.select import Chosen
from regard.engine.native import build

pytestmark = pytest.mark.skipif(bool(build.problem()), reason=f"nothing can be compiled here: {build.problem()}")

CAUSAL = regard.Causal()
LOCAL = ("softmax", "sigmoid", "softpick", "relu", "sparsemax", "entmax", "cog-attention", "ssmax", "qknorm")
BIASED = Weighted(position=Modified(lambda s, bias: s + bias, inputs=(Input("bias", "bhqk", default=0.0),)))


def agree(mechanism, mask=None, batch=2, heads=4, kv_heads=4, q_len=150, k_len=150, dim=24, value_dim=40, tolerance=1e-5, **inputs):
    """Values and gradients of q, k, v and every floating input equal the reference's."""
    torch.manual_seed(0)
    q = torch.randn(batch, heads, q_len, dim, dtype=torch.float64)
    k, v = (torch.randn(batch, kv_heads, k_len, d, dtype=torch.float64) for d in (dim, value_dim))
    g = torch.randn(batch, heads, q_len, value_dim, dtype=torch.float64)
    found = []
    for executor, dtype in (("reference", torch.float64), ("native", torch.float32)):
        tensors = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        given = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
        out = regard.attend(*tensors, mechanism, mask=mask, executor=executor, **given)
        found.append([out.detach(), *torch.autograd.grad(out, [*tensors, *given.values()], g.to(dtype))])
    for truth, ours in zip(*found, strict=True):
        assert ours.dtype == torch.float32
        scale = max(1.0, float(truth.abs().max()))
        torch.testing.assert_close(ours.double() / scale, truth / scale, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", LOCAL)
def test_row_local_mechanisms(name):
    agree(name, CAUSAL)
    agree(name, CAUSAL & regard.Window(50), heads=4, kv_heads=2, q_len=70, k_len=333, dim=40, value_dim=7)


@pytest.mark.parametrize(
    "score", [Distance(link="log"), Distance(1.0, "negative"), Distance(3.0, "inverse", 0.5), Distance(2.0, "gaussian")]
)
def test_distances(score):
    agree(Weighted(score=score), CAUSAL)
    agree(Weighted(score=score, position=Alibi()), None, heads=4, kv_heads=2, q_len=70, k_len=333, dim=40, value_dim=7)


def test_distances_do_not_cancel():
    """Queries that stand on a key: |q|^2 + |k|^2 - 2 q.k would be off by more than eps."""
    k = 30 * torch.randn(1, 1, 64, 32)
    q, v = k + 1e-3 * torch.randn(1, 1, 64, 32), torch.randn(1, 1, 64, 8)
    outs = [regard.attend(q, k, v, "idw-attention", executor=executor) for executor in ("native", "reference")]
    assert (outs[0] - outs[1]).abs().max() < 1e-4


def test_one_head_shared_out_over_threads():
    agree("softmax", CAUSAL, batch=1, heads=1, kv_heads=1, q_len=600, k_len=600)
    agree(Weighted(normalizer=softmax_plus()), CAUSAL, batch=1, heads=3, kv_heads=1, q_len=600, k_len=600, sink=torch.randn(3))


@pytest.mark.parametrize(
    ("mechanism", "inputs"),
    [
        ("entmax", {"alpha": torch.tensor([1.2, 1.5, 1.8, 2.0])}),
        ("sigmoid", {"bias": torch.randn(4)}),
        (Weighted(normalizer=softmax_plus()), {"sink": torch.randn(4)}),
        (BIASED, {"bias": torch.randn(1, 4, 150, 150)}),
        (BIASED, {"bias": torch.randn(2, 1, 1, 150)}),
        (Weighted(position=Alibi()), {}),
    ],
    ids=["alpha", "bias", "sink", "pair-bias", "key-bias", "alibi"],
)
def test_inputs_and_their_gradients(mechanism, inputs):
    agree(mechanism, CAUSAL, **inputs)


@pytest.mark.parametrize("name", ["softmax", "softpick", "entmax"])
def test_masks_that_read_tensors(name):
    keep = torch.arange(150)[None] < torch.tensor([[101], [150]])
    ids = (torch.arange(150) // 64 * 70_000_000)[None]
    q, k, v = (torch.randn(2, h, 150, 24) for h in (4, 2, 2))
    seen = torch.rand(2, 4, 150, 150) < 0.5
    for mask, given in (
        (regard.Padding(), {"keep": keep}),
        (CAUSAL & regard.Segments(), {"segments": ids}),
        (CAUSAL & regard.Segments() & regard.Padding(), {"segments": ids, "keep": keep}),
        (seen, {}),
    ):
        ours, truth = (regard.attend(q, k, v, name, mask=mask, executor=e, **given) for e in ("native", "reference"))
        torch.testing.assert_close(ours, truth, atol=2e-5, rtol=0)


def test_selections_of_blocks_and_of_queries():
    keep = torch.rand(2, 4, 3, 3) > 0.5
    blocks = Weighted(select=Chosen(lambda q, k, first: Selection(keep, 64, 64)))
    agree(blocks, None)
    agree(blocks, CAUSAL, kv_heads=2)
    agree(regard.get("moba", block_size=32, top_k=3), CAUSAL, kv_heads=2, q_len=333, k_len=333)


@pytest.mark.parametrize("length", [1, 7, 129])
def test_odd_shapes(length):
    agree("softpick", None, q_len=length, k_len=length + 3, dim=5, value_dim=3)
    agree("sparsemax", None, q_len=3, k_len=length, dim=5, value_dim=3)


def test_masked_rows_are_zero():
    q, k, v = (torch.randn(1, 2, 64, 8, requires_grad=True) for _ in range(3))
    for name in LOCAL:
        out = regard.attend(q, k, v, name, mask=lambda b, h, i, j: (j <= i) & (i > 40), executor="native")
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert (out[:, :, :41] == 0).all() and all(x.isfinite().all() for x in (out, *grads)), name


def test_statistics_merge_as_those_of_the_tiled_executor():
    q, k, v = (torch.randn(1, 2, 100, 8) for _ in range(3))
    for name in ("softmax", "softpick", "sigmoid"):
        ours = regard.attend_with_stats(q, k, v, name, mask=CAUSAL, executor="native")[1]
        theirs = regard.attend_with_stats(q, k, v, name, mask=CAUSAL, executor="tiled")[1]
        torch.testing.assert_close(ours.total * ours.shift.exp(), theirs.total * theirs.shift.exp(), atol=1e-4, rtol=1e-5)
        assert torch.equal(ours[2], theirs[2])


WORDS = {
    "exp": (torch.exp, -80, 80), "expm1": (torch.expm1, -80, 80), "log": (lambda s: torch.log(s.abs()), -1e9, 1e9),
    "log1p": (lambda s: torch.log1p(s.abs()), -1e3, 1e3), "tanh": (torch.tanh, -20, 20), "sigmoid": (torch.sigmoid, -60, 60),
    "erf": (torch.erf, -4, 4), "sin": (torch.sin, -30, 30), "cos": (torch.cos, -30, 30), "softplus": (F.softplus, -60, 60),
    "gelu": (F.gelu, -9, 9), "elu": (F.elu, -9, 9), "pow": (lambda s: s.abs() ** 1.7, -9, 9), "cube": (lambda s: s**3.0, -9, 9),
    "odd": (lambda s: s**5, -9, 9), "inverse": (lambda s: s.abs() ** -0.5, -9, 9), "where": (lambda s: torch.where(s > 0, s, 0.1 * s), -9, 9),
    "clamp": (lambda s: s.clamp(-1, 1), -9, 9), "sqrt": (lambda s: s.abs().sqrt(), -9, 9), "square": (lambda s: s.square(), -9, 9),
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_elementary_functions(word):
    """v is the identity, so the output is the matrix of weights itself."""
    function, low, high = WORDS[word]
    n = 128
    s = torch.linspace(low, high, n * n).view(1, 1, n, n)
    eye = torch.eye(n).view(1, 1, n, n)
    ours = regard.attend(s, eye, eye, Weighted(normalizer=RowLocal(weight=function)), scale=1.0, executor="native")
    torch.testing.assert_close(ours, function(s.double()).float(), rtol=2e-6, atol=1e-7)


def test_integer_arithmetic_of_indices():
    agree(Weighted(normalizer=RowLocal(weight=lambda s, i, j: s * ((i - j) % 3) / ((j - i) // 4 + 300))), CAUSAL)


def test_nan_is_not_hidden_and_infinity_is_not_made():
    q, k, v = (torch.randn(1, 1, 40, 8) for _ in range(3))
    q[0, 0, 3, 0] = math.nan
    out = regard.attend(q, k, v, "softmax", executor="native")
    assert out[0, 0, 3].isnan().all() and out[0, 0, [*range(3), *range(4, 40)]].isfinite().all()
    large = regard.attend(1e3 * torch.ones(1, 1, 40, 8), 1e3 * k, v, "softmax", executor="native")
    assert large.isfinite().all()


def test_planner_takes_it_for_large_calls_only():
    big, small = torch.empty(1, 8, 512, 64), torch.empty(1, 8, 32, 64)
    assert regard.plan(big, big, big, "sigmoid").executor == "native"
    assert regard.plan(small, small, small, "sigmoid").executor == "tiled"
    assert regard.plan(big.double(), big.double(), big.double(), "sigmoid").executor == "tiled"
    assert "exp_" in regard.plan(big, big, big, "sigmoid", executor="native", source=True).source


def test_without_a_compiler_the_tiled_executor_runs_and_the_plan_says_why():
    code = (
        "import torch, regard; x = torch.randn(1, 8, 512, 16); p = regard.plan(x, x, x, 'sigmoid');"
        "assert p.executor == 'tiled' and 'no C compiler' in dict(p.refused)['native'], p; regard.attend(x, x, x, 'sigmoid')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"CC": "no-such-compiler", "PATH": "/usr/bin"})
    assert done.returncode == 0, done.stderr


def test_a_compiler_that_fails_is_named(monkeypatch):
    monkeypatch.setenv("CC", "false")
    build.signature.cache_clear(), build.library.cache_clear()
    with pytest.raises(regard.RegardError, match="false cannot compile"):
        build.library("int regard_never(void) { return 7; }\n")
    monkeypatch.undo()
    build.signature.cache_clear(), build.library.cache_clear()


@pytest.mark.parametrize("march", ["x86-64-v2", "x86-64-v3"])
def test_other_instruction_sets(march):
    """What runs on older processors is built and held to the reference here as well."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("x86-64 has these names")
    code = (
        "import torch, regard; from regard.engine import native; torch.manual_seed(0)\n"
        "for sizes in ((150, 150), (37, 61)):\n"
        "    q, k, v = (torch.randn(1, 4, n, d, requires_grad=True) for n, d in zip((sizes[0], *sizes[1:] * 2), (24, 24, 40)))\n"
        "    for name in ('softpick', 'entmax', 'idw-attention'):\n"
        "        outs = [regard.attend(q, k, v, name, mask=regard.Causal(), executor=e) for e in ('native', 'reference')]\n"
        "        grads = [torch.autograd.grad(o.square().sum(), (q, k, v)) for o in outs]\n"
        "        for a, b in zip((outs[0], *grads[0]), (outs[1], *grads[1])):\n"
        "            assert (a - b).abs().max() <= 2e-4 * max(1.0, float(b.abs().max())), (sizes, name)\n"
        "print(native.block())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "REGARD_MARCH": march}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == {"x86-64-v2": "8 x 8, vectors of 4", "x86-64-v3": "6 x 16, AVX2"}[march]
