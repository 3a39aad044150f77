"""Parts of timm and torchvision models, replaced and put back exactly."""

import copy
import functools

import pytest
import torch
from torch import nn

from regard import RegardError
from regard.adapt import after, replace
from regard.nn.images import timm_host
from regard.zoo.vision.a2n import AttentionInAttention
from regard.zoo.vision.activator import ActivatorUnit
from regard.zoo.vision.cbam import CBAM
from regard.zoo.vision.contmix import ContMix
from regard.zoo.vision.convit import GPSA
from regard.zoo.vision.dependencyvit import ReversedAttention
from regard.zoo.vision.ela import ELA
from regard.zoo.vision.little_attention_block import LiteAttention
from regard.zoo.vision.litv2_hilo import HiLo
from regard.zoo.vision.mamba_yolo import SS2D
from regard.zoo.vision.mambaout import GatedCNNBlock
from regard.zoo.vision.mossformer import JointGatedAttention
from regard.zoo.vision.polarized_attention import PolarizedSelfAttention
from regard.zoo.vision.spa import SelectPackAttention
from regard.zoo.vision.twins import GlobalSubsampledAttention, LocallyGroupedAttention
from regard.zoo.vision.ulsam import ULSAM
from regard.zoo.vision.van_lka import LKA, LKAAttention

HOSTS = {
    "resnet18": ("torchvision", "layer*.*.bn2", 64),
    "mobilenet_v3_small": ("torchvision", "features.*.block.*.1", 64),
    "convnext_tiny": ("timm", "stages.*.blocks.*.conv_dw", 64),
    "vit_tiny_patch16_224": ("timm", "blocks.*.mlp", 64),
}


def host(name):
    package = timm_host.load(HOSTS[name][0])
    torch.manual_seed(0)
    options = {"img_size": 64} if name.startswith("vit") else {}
    made = (
        package.create_model(name, num_classes=3, **options) if HOSTS[name][0] == "timm" else getattr(package.models, name)(num_classes=3)
    )
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


class Inside(nn.Module):
    """A layer of maps or tokens in the place of a part that takes and gives the other kind: tokens (B, 1 + N, C) of a ViT, maps (B, C, H, W)."""

    def __init__(self, layer, takes, host, grid=True):
        super().__init__()
        self.layer, self.takes, self.host, self.grid = layer, takes, host, grid

    def forward(self, x, *args, **options):
        if self.host == "tokens":
            first, rest = x[:, :1], x[:, 1:]
            side = int(rest.shape[1] ** 0.5)
            maps = rest.mT.unflatten(2, (side, side))
            return torch.cat((first, self.run(maps).flatten(2).mT), 1)
        return self.run(x)

    def run(self, maps):
        shape = maps.shape[2:]
        if self.takes == "map":
            return self.layer(maps)
        if self.takes == "last":
            return self.layer(maps.movedim(1, -1)).movedim(-1, 1)
        tokens = maps.flatten(2).mT
        out = self.layer(tokens, tuple(shape)) if self.grid else self.layer(tokens)
        return out.mT.unflatten(2, shape)


DROP_INS = {  # of a width; what it takes: maps (B, C, H, W), maps with channels last, or tokens with their grid
    "cbam": ("map", lambda width: CBAM(width, 4)),
    "ela": ("map", lambda width: ELA(width, norm_groups=1)),
    "ulsam": ("map", lambda width: ULSAM(width, 4)),
    "polarized": ("map", PolarizedSelfAttention),
    "lka": ("map", LKA),
    "lka unit": ("map", LKAAttention),
    "lite": ("map", lambda width: LiteAttention(width, 4)),
    "a2n": ("map", lambda width: AttentionInAttention(width)),
    "contmix": ("map", lambda width: ContMix(width, kernel=5, small=3, heads=1, ratio=1.0, pool=2)),
    "mambaout": ("last", lambda width: GatedCNNBlock(width, ratio=1.5, kernel=3)),
    "twins local": ("tokens", lambda width: LocallyGroupedAttention(width, 1, 2)),
    "twins global": ("tokens", lambda width: GlobalSubsampledAttention(width, 1, 2)),
    "hilo": ("tokens", lambda width: HiLo(width, 2)),
    "gpsa": ("tokens", lambda width: GPSA(width, 1)),
    "ss2d": ("map", lambda width: SS2D(width, state=2)),
    "spa": ("plain tokens", lambda width: Outs(SelectPackAttention(width, 1))),
    "dependencyvit": ("plain tokens", lambda width: Outs(ReversedAttention(width, 1))),
    "activator": ("plain tokens", lambda width: ActivatorUnit(width, width)),
    "mossformer": ("plain tokens", lambda width: JointGatedAttention(width, 16, 8)),
}


class Outs(nn.Module):
    """The first of what a layer gives."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *given):
        return self.layer(*given)[0]


def put_in(name, host_kind):
    takes, make = DROP_INS[name]

    def scattered(width):
        layer = make(width)
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(0.1 * torch.randn_like(p))  # so that no layer starts as a factor, which a norm behind it takes away
        return layer

    return lambda width: Inside(scattered(width), "tokens" if "tokens" in takes else takes, host_kind, grid=takes == "tokens").eval()


@functools.cache
def cached(name):
    model = host(name)
    side = {"vit_tiny_patch16_224": (64, 64), "convnext_tiny": (72, 88)}.get(name, (40, 56))
    x = torch.randn(1, 3, *side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model, x, model(x)


WHERE = {  # a few parts of each host, whose maps are small here
    "resnet18": "layer[34].*.bn2",
    "mobilenet_v3_small": "features.[67].block.1",
    "convnext_tiny": "stages.[23].blocks.0.conv_dw",
    "vit_tiny_patch16_224": "blocks.[05].mlp",
}


@pytest.mark.parametrize("drop_in", DROP_INS)
@pytest.mark.parametrize("name", HOSTS)
def test_drop_ins_run_in_hosts_and_leave_no_trace(name, drop_in):
    model, x, before = cached(name)
    parts = dict(model.named_modules())
    with torch.no_grad():
        with replace(model, WHERE[name], after(put_in(drop_in, "tokens" if "vit" in name else "map"))) as done:
            out = model(x)
            assert out.shape == before.shape and out.isfinite().all() and not torch.equal(out, before) and len(done.names) >= 2
        assert torch.equal(model(x), before) and dict(model.named_modules()) == parts


@pytest.mark.parametrize("drop_in", ["cbam", "lka", "twins global", "hilo", "gpsa", "contmix", "mambaout", "spa", "dependencyvit", "ss2d"])
def test_mixers_in_place_of_attention(drop_in):
    model, x, before = cached("vit_tiny_patch16_224")
    with torch.no_grad():
        with replace(model, "blocks.3.attn", lambda attn: put_in(drop_in, "tokens")(attn.qkv.in_features)):
            out = model(x)
            assert out.shape == before.shape and out.isfinite().all() and not torch.equal(out, before)
        assert torch.equal(model(x), before)
