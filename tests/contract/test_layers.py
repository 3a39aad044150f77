"""What every layer must do, written once and run over the registry."""

from __future__ import annotations

import copy

import pytest
import torch
from layers import LAYERS, MODULES, given, make, tensors
from torch import nn

from regard import RegardError

CAUSAL = [name for name in MODULES if LAYERS[name].causal]
STEPS = [name for name in CAUSAL if hasattr(make(name), "step")]
UNFELT = {  # softmax does not feel what is added to all scores of a row, nor anything where there is one key; nor batch norms a bias
    "bipft": ("p_k.bias", "m_k.bias"),
    "contmix": ("fuse.0.bias", "norms.0.bias", "norms.1.bias", "norms.2.bias"),
    "convit": ("position.bias",),
    "hyperzzw": (  # the last is added to all alike, which loss_of leaves out
        "slow.y.bias",
        "fast.y.bias",
        "mix.bias",
        "bottleneck.bias",
        *(f"locals.{at}.bias" for at in range(4)),
        "after",
    ),
    "latent-monotonic-attention": ("energy.bias",),
    "mqsa-ted": ("k.bias",),
    "rcmha": ("head_convs.1.bias",),
    "sea": ("last.bias",),
    "set-transformer": ("k.bias", "mix.0.mab.k.weight"),
    "show-attend-tell": ("energy.bias",),
    "ulsam": ("wise.bias",),
}
WIDE = {"minimax-01": "logits in float32, for training and rollout to agree"}
ESTIMATED = {  # gradients that are no derivatives of the outputs, and so have none themselves
    "bipft": "signs and rounded probabilities learn straight through",
    "hgf": "weights and activations learn straight through their rounding",
    "hyperzzw": "the renormalisation of kernels that hear a map keeps what it normalises out of the gradient",
    "lalte": "the router learns straight through its decisions",
    "longvq": "keys learn straight through their codes",
    "sea": "the estimated map learns through the values that were chosen by it",
    "spa": "the gate learns straight through its choices",
    "transformer-vq": "keys learn straight through their codes",
}
ONE_SAMPLE = {
    "graph-transformer",  # its batch is one graph of several parts
    "hyperzzw",  # its kernels, and half its norms, are of the batch
}
LINEAR = {"csa", "sentence-attention-block"}  # in its first input
TRAINED_APART = {  # parameters that a loss of their own trains, or that training does not read
    "dcal": "the balance of its losses learns in the loss",
    "dr-rl": "the policy learns from rewards; attention from the task",
    "seerattention": "the gate learns from its own alignment loss; attention itself is the model's",
    "variational-attention": "the inference network learns where alignments are sampled",
    "sparsifiner": "the predicted mask learns from its own loss against the dense weights",
}


def cast(inputs, dtype):
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def loss_of(out):
    return sum((x.double() * torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape)).sum() for x in tensors(out))


def gap(a, b):
    return max(float((x.double() - y.double()).abs().max()) if x.numel() else 0.0 for x, y in zip(tensors(a), tensors(b), strict=True))


def test_every_layer_is_here():
    assert set(MODULES) == set(LAYERS)


@pytest.mark.parametrize("name", sorted(set(MODULES) - set(TRAINED_APART)))
def test_every_parameter_learns(name):
    layer = make(name).double()
    for p in layer.parameters():  # away from first values of zero, which stop gradients on their way
        p.data.add_(0.1 * torch.randn_like(p))
    loss_of(layer(*cast(given(name), torch.float64))).backward()
    for key, p in layer.named_parameters():
        if not p.requires_grad:  # a frozen host's
            continue
        size = 0.0 if p.grad is None else float(p.grad.abs().max())
        assert (size < 1e-12) if key.endswith(UNFELT.get(name, ())) and name in UNFELT else (1e-9 < size < float("inf")), (key, size)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ONE_SAMPLE])
def test_rows_of_a_batch_are_apart(name):
    layer, inputs = make(name).double().eval(), cast(given(name, 3), torch.float64)
    together = [x for x in tensors(layer(*inputs)) if x.dim() and x.shape[0] == 3]
    assert together
    for at in range(3):
        alone = layer(*(x[at : at + 1] if isinstance(x, torch.Tensor) else x for x in inputs))
        for a, b in zip(together, [x for x in tensors(alone) if x.dim()], strict=True):
            assert float((a[at] - b[0]).abs().max()) < 1e-9


@pytest.mark.parametrize("name", MODULES)
def test_few_tokens_or_a_reason(name):
    for length in sorted({1, 2, 3, LAYERS[name].shortest}):
        try:
            out = make(name).eval()(*given(name, 2, length))
        except RegardError:
            assert length < LAYERS[name].shortest or length != LAYERS[name].length
        else:
            assert all(x.isfinite().all() for x in tensors(out))


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"gaam"}))  # which takes a tensor of any shape
def test_other_shapes_are_refused(name):
    layer, inputs = make(name).eval(), given(name)
    if not inputs[0].is_floating_point():
        return
    channels = LAYERS[name].channels
    for bad in (torch.cat((inputs[0], inputs[0].narrow(channels, 0, 2)), channels), inputs[0][0], None):
        with pytest.raises(RegardError, match="expected"):
            layer(bad, *inputs[1:])


@pytest.mark.parametrize("name", CAUSAL)
def test_outputs_do_not_read_later_tokens(name):
    layer, inputs = make(name).double().eval(), cast(given(name), torch.float64)
    first = tensors(layer(*inputs))[0]
    for cut in (1, 5, 8):
        other = []
        for x in inputs:
            at = -1 if not x.is_floating_point() or x.dim() == 2 else -2
            changed = x.clone()
            tail = changed.narrow(at, cut, x.shape[at] - cut)
            tail.copy_(torch.randn_like(tail) if x.is_floating_point() else (tail + 3) % 20)
            other.append(changed)
        second = tensors(layer(*other))[0]
        before, after = ([x.narrow(-2, 0, cut) for x in (first, second)], [x.narrow(-2, cut, 12 - cut) for x in (first, second)])
        assert torch.allclose(*before, atol=1e-10) and not torch.allclose(*after, atol=1e-6)


@pytest.mark.parametrize("name", STEPS)
def test_steps_equal_the_whole(name):
    layer, inputs = make(name).double().eval(), cast(given(name), torch.float64)
    whole, state, parts = tensors(layer(*inputs))[0], None, []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 10), (10, 12)):
        piece = tuple(x[:, start:stop] for x in inputs)
        out, state = layer.step(*piece, state)
        parts.append(out)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-9)


@pytest.mark.parametrize("name", MODULES)
def test_state_goes_round(name):
    layer, other = make(name).eval(), make(name, 5).eval()
    other.load_state_dict(layer.state_dict())
    inputs = given(name)
    assert gap(layer(*inputs), other(*inputs)) == 0
    layer.train()(*inputs)
    assert gap(layer.eval()(*inputs), copy.deepcopy(layer)(*inputs)) == 0


@pytest.mark.parametrize("name", MODULES)
def test_dtypes_follow(name):
    layer, inputs = make(name).double().eval(), given(name)
    exact = layer(*cast(inputs, torch.float64))
    assert all(x.dtype == torch.float64 for x in tensors(exact))
    scale = max(float(x.abs().max()) for x in tensors(exact))
    single = layer.float()(*inputs)
    assert gap(exact, single) < 1e-3 * scale
    half = layer.bfloat16()(*cast(inputs, torch.bfloat16))
    assert all(x.isfinite().all() for x in tensors(half)) and tensors(half)[0].dtype == (torch.float32 if name in WIDE else torch.bfloat16)


@pytest.mark.parametrize("name", MODULES)
def test_made_without_memory(name):
    whole = make(name)
    with torch.device("meta"):
        empty = make(name)
    assert all(x.is_meta for x in empty.state_dict().values())
    assert {k: x.shape for k, x in empty.state_dict().items()} == {k: x.shape for k, x in whole.state_dict().items()}
    empty.to_empty(device="cpu").load_state_dict(whole.state_dict())
    assert gap(empty.eval()(*given(name)), whole.eval()(*given(name))) == 0


def drawn_by(layer: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers that the layer made itself: those of modules it was handed are not its own."""
    args, options = layer._made_with
    handed = {id(x) for one in (*args, *options.values()) if isinstance(one, nn.Module) for x in (*one.parameters(), *one.buffers())}
    return {name: x for name, x in (*layer.named_parameters(), *layer.named_buffers()) if id(x) not in handed}


APART = {"minimax-01": "is given one object of settings here", "dcal": "copies a block of its host, where that is"}
PLACED = [name for name in MODULES if name not in APART]


@pytest.mark.parametrize("name", PLACED)
def test_device_and_dtype_of_the_constructor(name):
    assert all(x.is_meta for x in drawn_by(make(name, device="meta")).values())
    exact = drawn_by(make(name, dtype=torch.float64))
    assert all(x.dtype == torch.float64 and not x.isnan().any() for x in exact.values() if x.is_floating_point())
    with pytest.raises(RegardError, match=r"dtype=torch\.int64"):
        make(name, dtype=torch.int64)


@pytest.mark.parametrize("name", MODULES)
def test_parameters_are_drawn_anew(name):
    layer = make(name)
    args, options = layer._made_with
    torch.manual_seed(7)
    wanted = drawn_by(type(layer)(*args, **options))
    with torch.no_grad():
        for x in (x for x in drawn_by(layer).values() if isinstance(x, nn.Parameter)):
            x += 1
    torch.manual_seed(7)
    layer.reset_parameters()
    assert all(torch.equal(x, wanted[key]) for key, x in drawn_by(layer).items())


@pytest.mark.parametrize("name", MODULES)
def test_autocast(name):
    layer, inputs = make(name), given(name)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(*inputs)
    assert all(x.isfinite().all() for x in tensors(out))
    if name in TRAINED_APART and not tensors(out)[0].requires_grad:
        return
    loss_of(out).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", MODULES)
def test_compiles(name):
    layer, inputs = make(name).eval(), given(name)
    compiled = torch.compile(layer, backend="eager")
    assert gap(compiled(*inputs), layer(*inputs)) < 1e-5


@pytest.mark.parametrize(
    "name", sorted(set(MODULES) - set(ESTIMATED) - LINEAR - {"minimax-01", "mqsa-ted"})
)  # which take numbers of tokens
def test_second_derivatives_or_a_reason(name):
    layer, inputs = make(name).double().eval(), cast(given(name, 1), torch.float64)
    x = inputs[0].requires_grad_()
    direction = torch.randn_like(x)

    def slope(x, again=False):
        return torch.autograd.grad(loss_of(layer(x, *inputs[1:])), x, create_graph=again)[0]

    try:
        curved = torch.autograd.grad((slope(x, True) * direction).sum(), x)[0]
    except (RegardError, RuntimeError) as why:
        assert isinstance(why, RegardError) or "derivative" in str(why) or "does not require grad" in str(why)
        return
    step = 1e-5
    ahead, behind = (slope((x + sign * step * direction).detach().requires_grad_()) for sign in (1, -1))
    truth = (ahead - behind) / (2 * step)
    assert float((curved - truth).abs().max()) < 1e-4 * max(1.0, float(truth.abs().max()))
