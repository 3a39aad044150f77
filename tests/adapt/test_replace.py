"""Parts of timm and torchvision models, replaced and put back exactly."""

import copy

import pytest
import torch
from torch import nn

from regard import RegardError
from regard.adapt import after, replace
from regard.nn.images import timm_host
from regard.zoo.vision.cbam import CBAM
from regard.zoo.vision.ela import ELA
from regard.zoo.vision.little_attention_block import LiteAttention
from regard.zoo.vision.polarized_attention import PolarizedSelfAttention
from regard.zoo.vision.ulsam import ULSAM
from regard.zoo.vision.van_lka import LKA

HOSTS = {
    "resnet18": ("torchvision", "layer*.*.bn2", 64),
    "mobilenet_v3_small": ("torchvision", "features.*.block.*.1", 64),
    "convnext_tiny": ("timm", "stages.*.blocks.*.conv_dw", 64),
    "vit_tiny_patch16_224": ("timm", "blocks.*.mlp", 224),
}


def host(name):
    package = timm_host.load(HOSTS[name][0])
    torch.manual_seed(0)
    made = package.create_model(name, num_classes=3) if HOSTS[name][0] == "timm" else getattr(package.models, name)(num_classes=3)
    return made.eval()


class Doubled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 2.0))

    def forward(self, x):
        return x * (self.weight if x.shape[-1] == len(self.weight) and x.dim() == 3 else self.weight[:, None, None])


@pytest.mark.parametrize("name", HOSTS)
def test_four_hosts_are_restored_exactly(name):
    model, (_, where, side) = host(name), HOSTS[name]
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        before, state, parts = model(x), copy.deepcopy(model.state_dict()), dict(model.named_modules())
        with replace(model, where, after(Doubled)) as done:
            assert len(done.names) >= 4 and not torch.equal(model(x), before)
            assert sum(isinstance(part, Doubled) for part in model.modules()) == len(done.names)
        assert torch.equal(model(x), before)
    assert dict(model.named_modules()) == parts
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()) and list(state) == list(model.state_dict())


def test_gates_behind_batch_norms_take_their_widths_device_and_mode():
    model = host("resnet18").double()
    with replace(model, "layer*.*.bn2", after(CBAM)) as done:
        gates = [part for part in model.modules() if isinstance(part, CBAM)]
        assert [gate.channels for gate in gates] == [64, 64, 128, 128, 256, 256, 512, 512] and len(done.names) == 8
        assert all(p.dtype == torch.float64 for p in model.parameters()) and not any(part.training for part in model.modules())
        model.train()(torch.randn(2, 3, 64, 64, dtype=torch.float64)).sum().backward()
        assert all(p.grad is not None for gate in gates for p in gate.parameters())


def test_by_type_by_function_and_outermost_first():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 5), nn.ReLU())
    assert replace(model, nn.ReLU, lambda part: nn.GELU()).names == ("0.1", "2")
    assert replace(model, lambda name, part: name == "1", lambda part: nn.Identity()).names == ("1",)
    assert replace(model, nn.Sequential, lambda part: nn.Identity()).names == ("0",)
    assert isinstance(model[0], nn.Identity)


def test_one_part_under_two_names_becomes_one():
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Linear(2, 2), shared)
    with replace(model, nn.ReLU, lambda part: nn.GELU()) as done:
        assert model[0] is model[2] and isinstance(model[0], nn.GELU) and done.names == ("0", "2")
    assert model[0] is model[2] is shared


def test_nested_replacements_are_undone_in_order():
    model = nn.Sequential(nn.ReLU())
    first = replace(model, nn.ReLU, lambda part: nn.GELU())
    second = replace(model, nn.GELU, lambda part: nn.Tanh())
    with pytest.raises(RegardError, match="expected to restore the later change first"):
        first.restore()
    second.restore()
    first.restore()
    assert isinstance(model[0], nn.ReLU)


def test_refusals_leave_the_model_alone():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    before = dict(model.named_modules())
    for where, factory, words in (
        ("layer*", after(Doubled), "names no part"),
        (nn.Conv2d, after(Doubled), "names no part"),
        ("*", lambda part: 3, "gave int"),
        (nn.ReLU, after(Doubled), "does not say how many channels"),
    ):
        with pytest.raises(RegardError, match=words):
            replace(model, where, factory)
    assert dict(model.named_modules()) == before


DROP_INS = {
    "cbam": lambda width: CBAM(width, 4),
    "ela": lambda width: ELA(width, norm_groups=1),
    "ulsam": lambda width: ULSAM(width, 4),
    "polarized": PolarizedSelfAttention,
    "lka": LKA,
    "lite": lambda width: LiteAttention(width, 4),
}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext_tiny"])
def test_drop_ins_run_in_hosts_and_leave_no_trace(name):
    model, where = host(name), HOSTS[name][1]
    x = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        before = model(x)
        for make in DROP_INS.values():
            with replace(model, where, after(make)) as done:
                out = model(x)
                assert out.shape == before.shape and out.isfinite().all() and not torch.equal(out, before) and len(done.names) >= 4
            assert torch.equal(model(x), before)
