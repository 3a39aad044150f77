"""How the papers' layers dress their mechanisms: norms and their eps, activations, gates, positions, and what makes the inputs of a mechanism."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import regard
from regard.algebra import Learned, Projected, Recipe
from regard.engine.composed import inputs_of

SILU_QKV = {"activation": "silu", "value_activation": "silu"}
DELTA = {**SILU_QKV, "short_conv": 4, "qk_eps": 1e-6, "out_norm": "rms", "norm_eps": 1e-5}
LOG = {**DELTA, "qk_norm": "l2", "out_gate": "silu"}
GSA = {"conv_activation": "silu", "value_activation": "silu", "out_activation": "silu", "merge_norm": "rms"}
GLA = {"conv_activation": "silu", "out_norm": "rms", "out_gate": "silu"}
LIGHT = {"merge_norm": "rms", "out_gate": "silu"}

# slug, options, what differs from a bare layer without rotary positions
RECIPES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *((slug, {}, {}) for slug in ("cosformer", "efficient-attention", "fast-attention", "flatten", "flowformer", "galerkin", "inline-attention")),
    *((slug, {}, {}) for slug in ("l2vit", "lln-attention", "mala", "nalaformer", "nha", "rala", "slab", "soft", "transnormer")),
    ("flowformer", {"causal": True}, {}),
    ("lln-attention", {"diagonal": True}, {}),
    ("based", {}, {"key_dim": 16}),
    ("based", {"feature_dim": 7}, {"key_dim": 7}),
    ("hedgehog", {}, {"rope": True}),
    ("performer", {}, {"rope": True}),
    ("agent-attention", {}, {"rope": True}),
    ("local-linear-attention", {}, {"rope": True, "qk_norm": "rms"}),
    ("deltanet", {}, {**DELTA, "qk_norm": "l2"}),
    ("efla", {}, {**DELTA, "qk_norm": "q_l2"}),
    ("log-linear-attention", {}, LOG),
    ("log-linear-attention", {"base": "gated-delta", "short_conv": 3}, {**LOG, "short_conv": 3}),
    ("gla", {}, {**GLA, "norm_eps": 1e-5, "key_dim": 0.5}),
    ("gla", {"short_conv": 3, "norm_eps": 0.1, "key_dim": 5}, {**GLA, "short_conv": 3, "norm_eps": 0.1, "key_dim": 5}),
    ("gsa", {}, {**GSA, "activation": "silu", "norm_eps": 1e-5}),
    ("gsa", {"feature_map": "t2r", "short_conv": 2, "norm_eps": 0.1}, {**GSA, "activation": "t2r", "short_conv": 2, "norm_eps": 0.1}),
    ("lightnet", {}, {**LIGHT, "gate_rank": 128, "norm_eps": 1e-5}),
    (
        "lightnet",
        {"gate_rank": 3, "key_dim": 0.25, "short_conv": 2, "norm_eps": 0.1},
        {**LIGHT, "gate_rank": 3, "key_dim": 0.25, "short_conv": 2, "norm_eps": 0.1},
    ),
    ("lightning-attention", {}, {**SILU_QKV, "merge_norm": "srms", "out_gate": "sigmoid"}),
    ("lightning-attention", {"norm": "layer", "gate_rank": 4}, {**SILU_QKV, "merge_norm": "layer", "out_gate": "sigmoid", "gate_rank": 4}),
    ("lightning-attention-2", {}, {"activation": "silu", "out_norm": "rms", "out_gate": "silu"}),
    ("transnormerllm", {}, {"activation": "silu", "merge_norm": "srms", "out_gate": "linear"}),
    ("transnormerllm", {"layer": 1, "layers": 2}, {"activation": "silu", "merge_norm": "srms", "out_gate": "linear"}),
    ("regla", {}, {"out_norm": "rms"}),
]  # fmt: skip

# slug, options, input, its letters, its default, and what is asked of the projection that makes it (None: it is learned or the caller's)
INPUTS: list[tuple[str, dict[str, Any], str, str, object, Projected | None]] = [
    ("gla", {}, "log_decay", "bhkd", None, Projected(rank=16, bias=0.0, grouped=True)),
    ("gla", {"gate_rank": 3, "gate_bias": 1.5}, "log_decay", "bhkd", None, Projected(rank=3, bias=1.5, grouped=True)),
    ("gsa", {}, "log_forget", "bhkf", None, Projected(channels=64, grouped=True)),
    ("gsa", {"slots": 5}, "log_forget", "bhkf", None, Projected(channels=5, grouped=True)),
    ("gsa", {}, "write", "bhkf", "1 - f", None),
    ("gsa", {"gates": "sum", "slots": 5}, "write", "bhkf", None, Projected(channels=5, grouped=True)),
    ("nha", {}, "log_forget", "bhkf", None, Projected(channels=64, grouped=True)),
    ("regla", {}, "log_decay", "bhkd", None, Projected(rank=16, bias=3.0, times=2)),
    ("regla", {"rank": None, "bias": 1.0}, "log_decay", "bhkd", None, Projected(bias=1.0, times=2)),
    ("log-linear-attention", {}, "log_decay", "bhk", None, Projected(bias=2.0)),
    ("log-linear-attention", {}, "level_scales", "bhkf", None, Projected(channels=18, bias=0.5)),
    ("log-linear-attention", {"base": "gated-delta", "levels": 4}, "level_scales", "bhkf", None, Projected(channels=4, bias=0.5)),
    ("log-linear-attention", {"base": "gated-delta"}, "log_decay", "bhk", None, Projected(bias=2.0)),
    ("log-linear-attention", {"base": "gated-delta"}, "beta", "bhk", None, Projected()),
    ("deltanet", {}, "beta", "bhk", None, Projected()),
    ("efla", {}, "beta", "bhk", None, Projected()),
    ("agent-attention", {}, "gather_bias", "hqk", 0.0, None),
    ("agent-attention", {}, "spread_bias", "hqk", 0.0, None),
    ("lln-attention", {"statistics": "given"}, "sigma_q", "", 1.0, None),
    ("lln-attention", {"statistics": "given"}, "sigma_k", "", 1.0, None),
    ("lln-attention", {"statistics": "given", "shift": "given"}, "key_max", "bh", None, None),
    ("hedgehog", {}, "query_shift", "h", 0.0, None),
    ("cosformer", {"horizon": 9.0}, "horizon", "", 9.0, None),
]


def names(cases: list[Any]) -> list[str]:
    return [f"{case[0]}-{at}" for at, case in enumerate(cases)]


@pytest.mark.parametrize(("slug", "options", "changes"), RECIPES, ids=names(RECIPES))
def test_recipes(slug: str, options: dict[str, Any], changes: dict[str, Any]) -> None:
    assert regard.get(slug, **options).recipe == Recipe(**{"rope": False, **changes})


@pytest.mark.parametrize(("slug", "options", "name", "shape", "default", "made"), INPUTS, ids=names(INPUTS))
def test_inputs(slug: str, options: dict[str, Any], name: str, shape: str, default: object, made: Projected | None) -> None:
    (item,) = (one for one in inputs_of(regard.get(slug, **options)) if one.name == name)
    assert item.shape == shape and item.default == default
    if made is None:
        assert not isinstance(item.layer, Projected)
    else:
        assert isinstance(item.layer, Projected) and dataclasses.replace(item.layer, transform=None) == made


@pytest.mark.parametrize(
    ("slug", "options", "name", "trainable"),
    [
        ("cosformer", {}, "horizon", False),
        ("hedgehog", {}, "query_map", True),
        ("hedgehog", {}, "key_map", True),
        ("hedgehog", {}, "key_shift", False),
        ("lightnet", {"grid": (3, 4)}, "theta", True),
        ("lightning-attention", {}, "log_decay", False),
        ("transnormerllm", {}, "theta", True),
        ("transnormerllm", {}, "log_decay", False),
        ("lln-attention", {"statistics": "given"}, "sigma_q", False),
    ],
)
def test_what_a_layer_learns(slug: str, options: dict[str, Any], name: str, trainable: bool) -> None:
    (item,) = (one for one in inputs_of(regard.get(slug, **options)) if one.name == name)
    assert isinstance(item.layer, Learned) and item.layer.trainable == trainable
