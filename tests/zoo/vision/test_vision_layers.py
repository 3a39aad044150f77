"""What every vision layer must do beside the contracts of layers: gradients in float64, any memory order, odd sizes, few values."""

import pytest
import torch
from layers import LAYERS, MODULES, given, make, tensors

from regard import RegardError, records

VISION = {record.slug for record in records("vision", "works")}
ESTIMATED = {  # gradients that are no derivatives
    "hyperzzw",  # what its kernels' renormalisation divides by is kept out of the gradient
    "ifam",  # the mask between its stages learns straight through
    "spa",  # its gate learns straight through
}
LAYERS_OF_VISION = sorted(name for name in MODULES if name in VISION)
PLANES = sorted(name for name in MODULES if name in VISION and LAYERS[name].channels == 1 and given(name)[0].dim() == 4)


def loss(out):
    return sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in tensors(out))


@pytest.mark.parametrize("name", [name for name in LAYERS_OF_VISION if name not in ESTIMATED])
def test_gradients_are_the_derivatives(name):
    layer = make(name).double().eval()
    x, *rest = (y.double() if isinstance(y, torch.Tensor) and y.is_floating_point() else y for y in given(name, 1))
    x.requires_grad_()
    slope, direction, step = torch.autograd.grad(loss(layer(x, *rest)), x)[0], torch.randn_like(x), 1e-6
    with torch.no_grad():
        rise = (loss(layer(x + step * direction, *rest)) - loss(layer(x - step * direction, *rest))) / (2 * step)
    assert float((slope * direction).sum()) == pytest.approx(float(rise), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", PLANES)
def test_memory_order_does_not_matter(name):
    layer, (x, *rest) = make(name).eval(), given(name)
    for y in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        for a, b in zip(tensors(layer(x, *rest)), tensors(layer(y, *rest)), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", PLANES)
def test_one_value_a_channel_in_training_is_right_or_refused(name):
    layer, (x, *rest) = make(name).train(), given(name, 1)
    try:
        out = layer(x[:, :, :1, :1], *rest)
    except RegardError as why:
        assert "expected" in str(why)
    else:
        assert all(y.isfinite().all() for y in tensors(out))
