"""What layers of linear rows are made of before they learn: shapes at the defaults of their papers, and the values that they start from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.zoo.linear.based import GatedConv
from regard.zoo.linear.lightnet import LightNet
from regard.zoo.linear.longvq import LongVQBlock
from regard.zoo.linear.mamba_rank_analysis import SelectiveSSM, VisionMamba
from regard.zoo.linear.mega import MegaLayer
from regard.zoo.linear.vig import BiGLA2D, ViG

# slug, layer, and the shapes of some of its parameters, which checks read off the layer
SHAPES: list[tuple[str, Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = [
    (
        "mega",
        lambda: MegaLayer(12),
        {
            "norm.weight": (12,), "norm.bias": (12,), "v.weight": (24, 12), "m.weight": (112, 12), "h.weight": (12, 24), "h.bias": (12,),
            "kappa": (2, 64), "mu": (2, 64), "offsets": (2047,), "ema.alpha": (1, 12, 16), "ema.omega": (12,),
        },
    ),
    ("mega", lambda: MegaLayer(12, 6, positions="rotary", causal=False), {"alpha": (6,), "beta": (6,), "ema.alpha": (2, 12, 16)}),
    (
        "longvq",
        lambda: LongVQBlock(12),
        {
            "v.weight": (24, 12), "m.weight": (112, 12), "h.weight": (12, 24), "kappa": (2, 64), "offsets": (64,), "ema.alpha": (1, 12, 16),
            "codebook.codes": (1, 512, 64),
        },
    ),
    ("longvq", lambda: LongVQBlock(12, causal=False), {"ema.alpha": (2, 12, 16)}),
    (
        "vig",
        lambda: ViG(3, 5),
        {
            "patch.weight": (64, 3, 2, 2), "mixers.1.qkv.weight": (128, 64), "mixers.1.norm_far.weight": (32,), "head.weight": (5, 64),
            "mlps.1.gate.weight": (128, 64), "mlps.1.down.weight": (64, 128), "norms2.1.weight": (64,),
        },
    ),
    ("vig", lambda: BiGLA2D(32, 4), {"gates.0.weight": (16, 32), "gates.1.weight": (32, 16), "norm_near.weight": (8,)}),
    (
        "lightnet",
        lambda: LightNet(3, 5, (3, 4)),
        {
            "start.weight": (64, 3), "place.mixers.1.alpha": (2, 64, 1), "mixers.1.gate.0.weight": (64, 64), "mlps.1.up.weight": (128, 64),
            "mlps.1.down.weight": (64, 128), "end.weight": (5, 64), "mixers.1.inputs.learned.theta": (2, 32, 2),
        },
    ),
    ("lightnet", lambda: LightNet(3, 5, (3, 4), dim=160, ndim=3), {"mixers.0.gate.0.weight": (128, 160), "place.mixers.0.alpha": (2, 160, 3)}),
    (
        "mamba-rank-analysis",
        lambda: VisionMamba(3, 6, 2, 4, 16),
        {
            "patch.weight": (6, 3, 4, 4), "place": (1, 16, 6), "mixers.1.read.1.weight": (14, 6), "mixers.1.log_a": (2, 6, 4),
            "gates.1.weight": (6, 6), "outs.1.weight": (6, 6),
        },
    ),
    ("mamba-rank-analysis", lambda: SelectiveSSM(6), {"log_a": (1, 6, 8), "read.0.weight": (22, 6), "read.0.bias": (22,)}),
    ("based", lambda: GatedConv(8, expand=3), {"left.weight": (24, 8), "right.weight": (24, 8), "out.weight": (8, 24), "conv.weight": (24, 1, 3)}),
    ("based", lambda: GatedConv(8, 5, bias=True, conv_bias=True), {"left.bias": (8,), "right.bias": (8,), "out.bias": (8,), "conv.weight": (8, 1, 5), "conv.bias": (8,)}),
    (
        "agent-attention",
        lambda: regard.nn.AgentAttention(16, 2, (8, 6), sr_ratio=2),
        {
            "gather_grid": (2, 49, 7, 7), "gather_row": (2, 49, 4, 1), "gather_column": (2, 49, 1, 3), "gather_cls": (2, 49, 1),
            "spread_grid": (2, 49, 7, 7), "spread_row": (2, 49, 8, 1), "spread_column": (2, 49, 1, 6), "spread_cls": (2, 49, 1),
            "conv.weight": (16, 1, 3, 3), "qkv.weight": (48, 16), "reduce.conv.weight": (16, 16, 2, 2),
        },
    ),
    (
        "soft",
        lambda: regard.nn.SoftmaxFreeAttention(16, 2, (4, 4), conv=True),
        {"landmark.weight": (8, 8, 2, 2), "landmark.bias": (8,), "norm.weight": (8,), "conv.weight": (16, 1, 3, 3), "conv.bias": (16,), "v.bias": (16,)},
    ),
    ("soft", lambda: regard.nn.SoftmaxFreeAttention(16, 2, (6, 6), 3, conv=5, conv_bias=False), {"landmark.weight": (8, 8, 3, 3), "conv.weight": (16, 1, 5, 5)}),
]  # fmt: skip


@pytest.mark.parametrize(("slug", "made", "shapes"), SHAPES, ids=[f"{slug}-{at}" for at, (slug, *_) in enumerate(SHAPES)])
def test_shapes(slug: str, made: Callable[[], nn.Module], shapes: dict[str, tuple[int, ...]]) -> None:
    with torch.device("meta"):
        found = {name: tuple(x.shape) for name, x in made().state_dict().items()}
    assert {name: found.get(name) for name in shapes} == shapes


def normal(x: Tensor, mean: float, std: float) -> bool:
    x = x.detach().double()
    return (
        abs(float(x.mean()) - mean) < 5 * std / x.numel() ** 0.5 and abs(float(x.std(correction=0)) / std - 1) < 5 / (2 * x.numel()) ** 0.5
    )


def all_are(x: Tensor, value: float) -> bool:
    return bool((x == value).all())


# slug, layer, parameter, what is true of its first value
STARTS: list[tuple[str, Callable[[], nn.Module], str, Callable[[Tensor], bool]]] = [
    ("mega", lambda: MegaLayer(8, 300, reach=300), "kappa", lambda x: normal(x, 1, 0.02)),
    ("mega", lambda: MegaLayer(8), "mu", lambda x: all_are(x, 0)),
    ("mega", lambda: MegaLayer(8, reach=600), "offsets", lambda x: normal(x, 0, 0.02)),
    ("mega", lambda: MegaLayer(8, 900, positions="rotary"), "alpha", lambda x: normal(x, 0, 0.02)),
    ("mega", lambda: MegaLayer(8, 900, positions="rotary"), "beta", lambda x: normal(x, 0, 0.02)),
    ("longvq", lambda: LongVQBlock(8, zdim=300), "kappa", lambda x: normal(x, 1, 0.02)),
    ("longvq", lambda: LongVQBlock(8), "mu", lambda x: all_are(x, 0)),
    ("longvq", lambda: LongVQBlock(8), "offsets", lambda x: all_are(x, 0)),
    ("lightnet", lambda: LightNet(3, 5, (3, 4)), "place.mixers.1.omega", lambda x: all_are(x, 0)),
    ("mamba-rank-analysis", lambda: VisionMamba(1, 48, 1, 4, 30), "place", lambda x: normal(x, 0, 0.02)),
    (
        "mamba-rank-analysis",
        lambda: SelectiveSSM(3, 4, True),
        "log_a",
        lambda x: torch.allclose(x, torch.tensor([1.0, 2.0, 3.0, 4.0]).log().expand(2, 3, 4)),
    ),
    *(
        ("agent-attention", lambda: regard.nn.AgentAttention(64, 8, (12, 10), cls=True), f"{side}_{part}", lambda x: normal(x, 0, 0.02))
        for side in ("gather", "spread")
        for part in ("grid", "row", "column", "cls")
    ),
]


@pytest.mark.parametrize(("slug", "made", "name", "holds"), STARTS, ids=[f"{slug}-{name}" for slug, _, name, _ in STARTS])
def test_first_values(slug: str, made: Callable[[], nn.Module], name: str, holds: Callable[[Tensor], bool]) -> None:
    torch.manual_seed(0)
    assert holds(dict(made().named_parameters())[name])


def test_lightnet_s_mixing_along_axes_adds_the_token_once_for_good() -> None:
    assert all(not mixer.omega.requires_grad for mixer in LightNet(3, 5, (3, 4)).place.mixers)  # type: ignore[union-attr]


def test_longvq_tells_its_state_s_size_and_refuses_what_it_cannot_do() -> None:
    layer, x = LongVQBlock(8, codes=5, zdim=4, hdim=6, ndim=3, window=4), torch.randn(2, 9, 8)
    _, state = layer.step(x)
    assert state.length == 9 and state.bytes == state.codes.bytes + 2 * 8 * 3 * 4
    with pytest.raises(regard.RegardError, match="causal=True"):
        LongVQBlock(8, causal=False).step(x)
    with pytest.raises(regard.RegardError, match="at most block"):
        LongVQBlock(8, window=9, block=7)
    assert (
        LongVQBlock(8, window=8, block=7).block == 7 and LongVQBlock(8, window=8).block == 8 and LongVQBlock.residual and MegaLayer.residual
    )


def test_longvq_learns_codes_in_training_alone() -> None:
    torch.manual_seed(0)
    layer, x = LongVQBlock(8, codes=5, zdim=4, ndim=3, window=4), torch.randn(2, 9, 8)
    before = layer.codebook.codes.clone()
    layer.eval()(x)
    assert torch.equal(layer.codebook.codes, before)
    layer.train()(x)
    assert not torch.equal(layer.codebook.codes, before)


def test_mega_tells_its_state_s_size_and_refuses_what_it_cannot_do() -> None:
    layer, x = MegaLayer(8, 4, 6, 3, chunk=5), torch.randn(2, 12, 8)
    _, state = layer.step(x)
    assert state.length == 12 and state.z.shape == (2, 2, 4) and state.v.shape == (2, 2, 6) and state.bytes == 4 * 2 * (8 * 3 + 2 * 10)
    whole, (_, first) = layer(x), layer.step(x[:, :10])
    torch.testing.assert_close(layer.step(x[:, 10:], first)[0], whole[:, 10:])
    bare = MegaLayer(8, 4, 6, 3, ema=False)
    torch.testing.assert_close(bare.step(x)[0], bare(x))
    with pytest.raises(regard.RegardError, match="causal=True"):
        MegaLayer(8, causal=False).step(x)
    for wrong in ({"attn": "other"}, {"positions": "other"}, {"norm": "other"}):
        with pytest.raises(regard.RegardError, match="'other'"):
            MegaLayer(8, **wrong)  # type: ignore[arg-type]


def test_agent_attention_s_layer_names_its_agents() -> None:
    assert regard.nn.AgentAttention(16, 2, (4, 4), agents=9).mechanism == regard.get("agent-attention", agents=9)
