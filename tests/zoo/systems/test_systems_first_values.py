"""First values of parameters whose paper or released code says them: constants, the spread of what is drawn, and the bounds of what is uniform."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems import (
    artificial_entanglement,
    atlas,
    block_transformer,
    hgf,
    hidden_transfer,
    lama,
    lina_speech,
    longspec,
    medusa,
    mla_moe_intensity,
    mqsa_ted,
)


def const(value):
    return lambda p: bool((p == value).all())


def spread(std):
    return lambda p: abs(float(p.std()) / std - 1) < 0.1 and abs(float(p.mean())) < 0.1 * std


def within(bound):
    return lambda p: 0.95 * bound < float(p.abs().max()) <= bound


def lina():
    model = lina_speech.LinaLM(9, 5, 2, dim=64, heads=4, layers=1, text_layers=1)
    return lina_speech.InitialStateTuner(model, 3)


def blocks():
    return block_transformer.BlockTransformerLM(200, 4, 64, 1, 1, 2, 32, positions=64, pad=3)


def made_atlas():
    base, other = nn.Linear(4, 3), nn.Linear(4, 3)
    return atlas.Atlas(base, atlas.TaskVectors(base, [other]), partition=2)


EXPECTED = {
    "artificial-entanglement": (
        lambda: artificial_entanglement.MPSAdapter(nn.Linear(512, 512), 64, outs=[8] * 3, ins=[4, 8, 16]),
        {"cores.0": spread(4**-0.5), "cores.1": spread(512**-0.5), "cores.2": const(0)},
    ),
    "atlas": (made_atlas, {"coefficients": const(0)}),
    "block-transformer": (
        blocks,
        {
            "embedder.weight": lambda p: const(0)(p[3]) and spread(0.02)(p[4:]),
            "embed.weight": spread(0.02),
            "head.weight": spread(0.02),
            "expand.weight": spread(64**-0.5),
            "expand.bias": const(0),
        },
    ),
    "hgf": (lambda: hgf.HGFDecoder(9, 64, 1, 1, 64, differential=True), {"places": spread(0.02), "mixers.0.lambdas": spread(0.1)}),
    "lama": (
        lambda: lama.LAMAPool(600, 8),
        {"p": within((6 / 608) ** 0.5), "q": within((6 / 608) ** 0.5), "context": spread(600**-0.5)},
    ),
    "lina-speech": (lina, {"u.0": spread(1), "w.0": spread(1), "u.2": spread(1), "w.2": spread(1)}),
    "longspec": (
        lambda: longspec.LongSpec(llama()),
        {
            **{f"{name}.weight": spread(0.02) for name in ("q", "k", "v", "out", "cross_q", "cross_out", "gate", "up", "down")},
            **{f"{name}.bias": const(0) for name in ("q", "k", "v", "cross_q")},
            **{f"norm{n}.weight": const(1) for n in (1, 2, 3)},
        },
    ),
    "mla-moe-intensity": (
        lambda: mla_moe_intensity.LatentAttention(16, 4, 64, 8, 16),
        {"up_k": spread(64**-0.5), "up_v": spread(64**-0.5)},
    ),
    "mqsa-ted": (
        lambda: mqsa_ted.MQSATED(200, 64),
        {"embed.weight": lambda p: const(0)(p[0]) and spread(0.01)(p[1:]), "place.weight": spread(0.01)},
    ),
}


@pytest.mark.parametrize("slug", EXPECTED)
def test_first_values(slug):
    torch.manual_seed(0)
    make, expected = EXPECTED[slug]
    found = dict(make().named_parameters())
    assert not {name for name, fits in expected.items() if not fits(found[name].detach())}


def test_heads_begin_as_the_model_itself():
    """medusa, hidden-transfer: what is added to a hidden state is nothing at first."""
    model, h = llama(), torch.randn(2, 3, 32, dtype=torch.float64)
    for head in medusa.Medusa(model, 3).heads:
        assert torch.equal(head(h), model.lm_head(h))
    for one in hidden_transfer.HiddenTransfer(llama(layers=3), [1, 2]).maps:
        assert torch.equal(one(h), h)
