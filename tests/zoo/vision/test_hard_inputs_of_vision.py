"""Every vision layer on inputs that are easy to get wrong: gradients that arrive strided, batches of one and of none, odd and tiny maps, half
precision, widths that do not divide: right, or one RegardError that says what was expected."""

import pytest
import torch
from layers import LAYERS, MODULES, given, make, tensors

from regard import RegardError, records
from regard.nn.images.planes import BatchNorm

VISION = {record.slug for record in records("vision", "works")}
HERE = sorted(name for name in MODULES if name in VISION)
PLANES = [name for name in HERE if LAYERS[name].channels == 1 and given(name)[0].dim() == 4 and LAYERS[name].factory is None]
WHOLE_BATCH = {"hyperzzw": "its kernels and half its norms are of the batch"}
SIDES = {"hyperzzw": "made for one side"}


def wide(name, batch, dtype=torch.float64):
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given(name, batch))


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_that_arrive_in_any_order_of_memory(name, batch):
    """Some norms of PyTorch read a strided gradient wrongly where the batch is one."""
    layer = make(name).double().eval()
    x, *rest = wide(name, batch)
    leaves = [x.requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]

    def felt(order):
        outs = tensors(layer(x, *rest))
        seeds = [torch.randn(y.shape, generator=torch.Generator().manual_seed(at), dtype=y.dtype) for at, y in enumerate(outs)]
        live = [(y, order(s)) for y, s in zip(outs, seeds, strict=True) if y.requires_grad]
        return torch.autograd.grad([y for y, _ in live], leaves, [s for _, s in live], allow_unused=True)

    def turned(s):
        return s.mT.contiguous().mT if s.dim() > 1 else s

    def last(s):
        return s.movedim(1, -1).contiguous().movedim(-1, 1) if s.dim() > 2 else s

    def between(s):
        return s.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1) if s.dim() == 4 else s

    def same(a, b):
        return all((p is None and q is None) or torch.allclose(p, q, rtol=1e-9, atol=1e-11) for p, q in zip(a, b, strict=True))

    truth = felt(lambda s: s)
    assert same(truth, felt(turned)) and same(truth, felt(last)) and same(truth, felt(between))
    flat = felt(lambda s: torch.ones((), dtype=s.dtype).expand(s.shape))
    assert same(flat, felt(lambda s: torch.ones_like(s)))


@pytest.mark.parametrize("name", HERE)
def test_batch_of_one_in_training(name):
    layer = make(name).train()
    try:
        out = layer(*given(name, 1))
    except RegardError as why:
        assert "expected" in str(why)
        return
    live = [x for x in tensors(out) if x.requires_grad]
    assert live and all(x.isfinite().all() for x in tensors(out))
    sum(x.square().sum() for x in live).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", HERE)
def test_batch_of_none(name):
    layer = make(name).eval()
    try:
        out = layer(*(x[:0] if isinstance(x, torch.Tensor) else x for x in given(name, 2)))
    except RegardError as why:
        assert "expected" in str(why)
        return
    assert tensors(out)[0].shape[0] == 0 and all(x.isfinite().all() for x in tensors(out))


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near(name, dtype):
    layer = make(name).double().eval()
    truth = tensors(layer(*wide(name, 2)))
    try:
        found = tensors(layer.to(dtype)(*wide(name, 2, dtype)))
    except RegardError as why:
        assert "expected" in str(why)
        return
    assert all(x.dtype in (dtype, torch.float32) and x.isfinite().all() == y.isfinite().all() for x, y in zip(found, truth, strict=True))
    loose = 0.02 if dtype == torch.float16 else 0.15
    first, other = found[0].double(), truth[0]
    assert float((first - other).norm()) < loose * float(other.norm()) + 1e-3


@pytest.mark.parametrize("name", [name for name in PLANES if name not in SIDES])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (3, 3), (9, 5), (13, 17)])
def test_any_size_of_map_is_right_or_refused(name, size):
    layer, (x, *rest) = make(name).double().eval(), given(name, 2)
    images = torch.randn(2, x.shape[1], *size, dtype=torch.float64)
    others = [torch.randn(*y.shape[:2], *size, dtype=torch.float64) if y.dim() == 4 else y.double() for y in rest]
    try:
        out = tensors(layer(images, *others))
    except RegardError as why:
        assert "expected" in str(why) and not (size == (9, 5) and name not in ("twins",))
        return
    assert all(y.isfinite().all() for y in out)
    if name not in WHOLE_BATCH:
        alone = tensors(layer(images[1:], *(y[1:] for y in others)))
        assert all(torch.allclose(a[1:], b, atol=1e-9) for a, b in zip(out, alone, strict=True) if a.dim() and len(a) == 2)
    if len(out[0].shape) == 4 and out[0].shape == images.shape:  # a map in the last memory order gives the same
        turned = tensors(layer(images.to(memory_format=torch.channels_last), *others))[0]
        assert torch.allclose(out[0], turned, atol=1e-9)


@pytest.mark.parametrize(
    "name", [name for name in HERE if {"channels", "dim"} & set(LAYERS[name].options) and LAYERS[name].factory is None]
)
def test_widths_that_do_not_divide_are_right_or_refused(name):
    key = "channels" if "channels" in LAYERS[name].options else "dim"
    for width in (1, 3, 7, 10, 13):
        try:
            layer = make(name, **{key: width}).eval()
        except RegardError as why:
            assert "expected" in str(why)
            continue
        x, *rest = given(name, 2)
        axis = LAYERS[name].channels
        size = [*x.shape]
        if x.shape[axis] == LAYERS[name].options[key]:
            size[axis] = width
        x = torch.randn(size)
        rest = [
            torch.randn(*y.shape[:-1], width) if isinstance(y, torch.Tensor) and y.shape[-1] == LAYERS[name].options[key] else y
            for y in rest
        ]
        try:
            out = tensors(layer(x, *rest))
        except RegardError as why:
            assert "expected" in str(why)
            continue
        assert all(y.isfinite().all() for y in out)


def test_norms_of_one_image_in_evaluation():
    norm, x = BatchNorm(4).double().eval(), torch.randn(1, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    for p in (*norm.parameters(), norm.running_mean):
        p.data.normal_()
    norm.running_var.uniform_(0.5, 2)
    seed = torch.randn(5, 1, 6, 4, dtype=torch.float64).permute(1, 3, 0, 2)
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    truth = (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
    assert torch.allclose(norm(x), truth)
    leaves = (x, norm.weight, norm.bias)
    for a, b in zip(torch.autograd.grad(norm(x), leaves, seed), torch.autograd.grad(truth, leaves, seed), strict=True):
        assert torch.allclose(a, b)
    with torch.no_grad():
        assert torch.allclose(norm(x), truth)
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16 and BatchNorm(4, affine=False).eval()(x.float()).shape == x.shape
