"""torch.compile, torch.export and torch.jit.trace give what the plain call gives, masks made inside included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import regard
from regard import Causal, Padding, Prefix, Segments, Window

OTHER, PLAIN = regard.Sinks(2), regard.Weighted()


class Attend(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, q, k, v):
        return regard.attend(q, k, v, self.name, mask=Causal())


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gap(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max())


FUNCTIONS = {
    "no mask": lambda q: regard.attend(q, q, q, "softpick"),
    "softmax": lambda q: regard.attend(q, q, q, mask=Causal()) * 2,
    "composed": lambda q: regard.attend(q, q, q, "softpick", mask=Causal() & (Window(5) | OTHER)),
    "softmax, composed": lambda q: regard.attend(q, q, q, mask=Causal() | Prefix(3)),
    "function": lambda q: regard.attend(q, q, q, mask=lambda b, h, i, j: (j <= i) & (i - j < 4 + h)),
    "bool tensor": lambda q: regard.attend(q, q, q, mask=torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(2)),
    "float tensor": lambda q: regard.attend(q, q, q, mask=torch.full((q.shape[2], q.shape[2]), float("-inf")).triu(1)),
    "segments": lambda q: regard.attend(q, q, q, "sigmoid", mask=Segments(), segments=torch.arange(q.shape[2])[None] // 6),
    "recurrence": lambda q: regard.attend(q, q, q, "lightning-attention"),
    "selection": lambda q: regard.attend(q, q, q, regard.get("moba", block_size=4, top_k=2), mask=Causal()),
    "description": lambda q: regard.attend(q, q, q, PLAIN, mask=Causal()),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("case", FUNCTIONS)
def test_compiled_functions(case, dynamic):
    f = FUNCTIONS[case]
    compiled = torch.compile(f, backend="eager", dynamic=dynamic)
    for shape in ((2, 3, 20, 8), (2, 3, 13, 8), (3, 3, 31, 8)):
        q = torch.randn(shape)
        assert gap(compiled(q), f(q)) < 1e-6


@pytest.mark.parametrize("dynamic", [None, True])
def test_softmax_needs_no_break(dynamic):
    for case in ("softmax", "bool tensor", "description"):
        torch._dynamo.reset()
        compiled = torch.compile(FUNCTIONS[case], backend="eager", fullgraph=True, dynamic=dynamic)
        for length in (20, 13):
            q = torch.randn(2, 3, length, 8)
            assert gap(compiled(q), FUNCTIONS[case](q)) < 1e-6
    torch._dynamo.reset()
    layer, x = regard.nn.Attention(32, 4, kv_heads=2), torch.randn(2, 20, 32)
    assert gap(torch.compile(layer, backend="eager", fullgraph=True, dynamic=dynamic)(x), layer(x)) < 1e-6


def test_layers_with_masks():
    layer, x = regard.nn.Attention(32, 4, "softpick"), torch.randn(2, 20, 32)
    keep = torch.arange(20) < torch.tensor([[20], [11]])
    for options in ({}, {"mask": Window(5)}, {"mask": Padding(), "keep": keep}):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, options=options: layer(x, **options), backend="eager")
        assert gap(compiled(x), layer(x, **options)) < 1e-6


def test_a_closure_that_changes_between_compiled_calls():
    held = [3]
    compiled = torch.compile(lambda q: regard.attend(q, q, q, mask=lambda b, h, i, j: (j <= i) & (i - j < held[0])), backend="eager")
    q = torch.randn(1, 2, 20, 8)
    for held[0] in (3, 9, 3):
        assert gap(compiled(q), regard.attend(q, q, q, mask=Causal() & Window(held[0]))) < 1e-6


@pytest.mark.parametrize("name", ["softmax", "softpick"])
def test_export_and_trace(name):
    qkv = [torch.randn(2, 3, 20, 8) for _ in range(3)]
    module = Attend(name)
    expected = module(*qkv)
    assert gap(torch.export.export(module, tuple(qkv)).module()(*qkv), expected) < 1e-5
    assert gap(torch.jit.trace(module, tuple(qkv))(*qkv), expected) < 1e-6
    assert gap(module(*qkv), expected) == 0  # nothing that was only traced is left in a cache
    longer = [torch.randn(2, 3, 33, 8) for _ in range(3)]
    assert gap(torch.jit.trace(Attend("softmax"), tuple(qkv))(*longer), Attend("softmax")(*longer)) < 1e-6


class Causally(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, q, k, v):
        return regard.attend(q, k, v, self.name, mask=Causal() & Window(31))


def cases_of_export():
    qkv = tuple(torch.randn(3, 1, 2, 70, 8))
    for name in ("softmax", "softpick", "sparsemax"):
        yield name, Causally(name), qkv
    for name in ("gla", "gsa", "deltanet", "hedgehog"):
        yield name, regard.nn.Attention(16, 2, name).eval(), (torch.randn(1, 70, 16),)


@pytest.mark.parametrize(
    ("name", "module", "given"),
    [pytest.param(*one, marks=pytest.mark.slow if one[0] == "sparsemax" else ()) for one in cases_of_export()],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_exported_programs_hold_for_other_numbers(name, module, given):
    """Masks, and numbers at which the plain call takes another way: large scores, strong decay."""
    program = torch.export.export(module, given).module()
    for scale in (1, 30):
        other = tuple(scale * torch.randn_like(x) for x in given)
        expected = module(*other)
        assert gap(program(*other), expected) < 1e-5 * max(1.0, float(expected.detach().abs().max()))


def test_onnx(tmp_path):
    """The ONNX runtime's output of causal softmax, of the tiled executor and of a recurrence."""
    import onnxruntime

    for name, module, given in cases_of_export():
        if name in ("softmax", "softpick", "gla"):
            torch.onnx.export(module, given, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
            session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
            other = [torch.randn_like(x) for x in given]
            fed = {one.name: x.numpy() for one, x in zip(session.get_inputs(), other, strict=True)}
            assert gap(torch.from_numpy(session.run(None, fed)[0]), module(*other)) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax", "softpick", "gla"])
def test_ahead_of_time(name, tmp_path):
    """AOTInductor's package of an exported program gives the plain call's numbers."""
    module, given = next((module, given) for other, module, given in cases_of_export() if other == name)
    with torch.no_grad():
        program = torch.export.export(module, given)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        other = tuple(torch.randn_like(x) for x in given)
        assert gap(torch._inductor.aoti_load_package(path)(*other), module(*other)) < 1e-5


def test_export_of_any_length():
    length = torch.export.Dim("length")
    program = torch.export.export(Attend("softmax"), (torch.randn(2, 3, 20, 8),) * 3, dynamic_shapes=({2: length},) * 3)
    q = torch.randn(2, 3, 33, 8)
    assert gap(program.module()(q, q, q), Attend("softmax")(q, q, q)) < 1e-6


def test_inference_mode_leaves_nothing_behind():
    masks = (None, Causal() & (Window(5) | regard.Sinks(2)), lambda b, h, i, j: i - j < 9)
    for name in ("softmax", "lssar", "ssmax", "neighborhood", "sparsemax"):
        mechanism = regard.get(name, shape=(6, 6), kernel=(3, 3)) if name == "neighborhood" else regard.get(name)
        for mask in masks:
            q = torch.randn(1, 2, 36, 8)
            with torch.inference_mode():
                regard.attend(q, q, q, mechanism, mask=mask)
            q = q.clone().requires_grad_()
            regard.attend(q, q, q, mechanism, mask=mask).sum().backward()
            assert q.grad.isfinite().all()


def test_operators_pass_opcheck():
    from regard.engine import kernels

    recorded = {}
    forward, backward = kernels.weighted, kernels.weighted_backward
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))

    class Spy:
        def __init__(self, name, op):
            self.name, self.op = name, op

        def __call__(self, *args):
            recorded[self.name] = tuple(
                [y.detach().clone() for y in x] if isinstance(x, list) else x.detach().clone() if isinstance(x, torch.Tensor) else x
                for x in args
            )
            return self.op(*args)

    kernels.weighted, kernels.weighted_backward = Spy("forward", forward), Spy("backward", backward)
    try:
        regard.attend(q, k, v, "softpick", mask=Causal(), executor="native").sum().backward()
    finally:
        kernels.weighted, kernels.weighted_backward = forward, backward
    torch.library.opcheck(forward, tuple(x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in recorded["forward"]))
    torch.library.opcheck(backward, recorded["backward"])
