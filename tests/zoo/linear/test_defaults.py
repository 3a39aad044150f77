"""Hyperparameters default to the papers' and their released code's; layers whose papers have no rotary positions refuse to turn."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import regard
from regard import nn
from regard.catalog import entry
from regard.nn.codes import Codebook
from regard.zoo.linear import based, deltanet, galerkin, lalte, minimax_01, minimax_m1, slab, transnormer

DEFAULTS: dict[str, dict[str, Any]] = {
    "afa": {"heads": 1, "head_dim": None, "context_len": 64, "frequencies": "learned", "robust": True, "gated": False, "noise": 0.1},
    "agent-attention": {"agents": 49},
    "based": {"feature_dim": 16, "packed": False, "eps": 1e-12, "divide": "sum"},
    "combiner": {"pattern": "fixed", "seg_len": None, "causal": True, "pool": "max"},
    "cosformer": {"horizon": None, "feature": "relu", "eps": 1e-6},
    "deltanet": {
        "negative_eigenvalues": False, "short_conv": 4, "conv_bias": False, "activation": "silu", "qk_norm": "l2", "out_gate": "",
        "key_dim": None, "norm_eps": 1e-5,
    },
    "efficient-attention": {"norm": "softmax"},
    "efla": {"order": None, "beta": "sigmoid", "short_conv": 4},
    "fast-attention": {"p": 2, "normalize": "token", "temperature": None, "eps": 1e-6},
    "fftnet": {"adaptive": True, "activation": "modrelu", "dropout": 0.0, "eps": 1e-6},
    "flatten": {"power": 3.0, "norm": "all", "eps": 1e-6},
    "flowformer": {"causal": False, "eps": 1e-6, "limit": 1.0},
    "galerkin": {"kind": "galerkin"},
    "gla": {"gate_rank": 16, "tau": 16.0, "key_dim": 0.5, "gate_bias": 0.0, "clamp_min": None, "norm_eps": 1e-5, "short_conv": 0},
    "gsa": {"slots": 64, "tau": 8.0, "gates": "forget", "scaled": False, "short_conv": 0, "feature_map": "silu", "norm_eps": 1e-5},
    "hedgehog": {"form": "softmax", "clamp": 1e-12, "eps": 1e-12, "divide": "add"},
    "inline-attention": {"feature": "identity", "temperature": None},
    "kernelized-attention-rpe": {"features": 64, "reach": 512, "causal": False, "scale": 1.0, "axes": 1, "seed": 0},
    "l2vit": {"floor": 100.0},
    "lalte": {"kv_heads": None, "window": 768, "sinks": 4, "budget": 512, "dropout": 0.1},
    "lightnet": {"grid": (), "scaled": True, "gate_rank": 128, "key_dim": None, "short_conv": 0, "norm_eps": 1e-5},
    "lightning-attention": {"layer": 0, "layers": 1, "gate_rank": None, "norm": "srms"},
    "lightning-attention-2": {"layer_share": 0.0},
    "lln-attention": {
        "statistics": "batch", "diagonal": False, "block_size": 64, "a": 0.14855178144710912, "b": -0.35487039130661086, "eps": 1e-8,
        "shift": "running",
    },
    "local-linear-attention": {"ridge": 1e-2, "solver": "cg", "iterations": 16, "kernel": "dot", "width": 1.0, "block": 128},
    "log-linear-attention": {"base": "mamba2", "levels": 18, "tau": 16.0, "short_conv": 4},
    "longvq": {"codes": 512, "zdim": 64, "hdim": None, "ndim": 16, "window": 64, "block": None, "causal": True},
    "mala": {"grid_width": None, "eps": 1e-6},
    "mamba-rank-analysis": {"length": 64, "state": 8, "dim": 16, "seed": 0},
    "mega": {
        "zdim": 64, "hdim": None, "ndim": 16, "chunk": None, "attn": "softmax", "causal": True, "reach": 1024, "ema": True,
        "positions": "simple", "norm": "layer", "norm_eps": 1e-5, "truncation": None,
    },
    "minimax-m1": {
        "loss": "cispo", "rounds": 40, "prompts": 16, "group": 8, "digits": 4, "answer": 3, "updates": 2, "lr": 3e-3, "seed": 0,
    },
    "nalaformer": {"power": 3.0, "offset": 0.5, "key_power": 3, "grid_width": None, "eps": 1e-6},
    "nha": {"window": 64, "slots": 64, "tau": 8.0, "rope": 10000.0},
    "performer": {
        "features": 256, "kernel": "softmax", "orthogonal": True, "hyperbolic": False, "regularised": False, "stabilize": True,
        "causal": True, "eps": None, "seed": 0, "sum_eps": 1e-6, "normalize": False,
    },
    "rala": {"grid_width": None, "eps": 1e-6},
    "regla": {"rank": 16, "bias": 3.0, "scaled": True},
    "sea": {"cells": 64, "keys": 32, "causal": False, "max_len": 2048, "features": 32, "grouped": True},
    "slab": {"eps": 1e-6},
    "soft": {"landmarks": 49, "iterations": 20, "ridge": None, "symmetric": False, "mode": None},
    "transformer-vq": {
        "heads": 1, "codes": 512, "block": 512, "key_dim": None, "value_dim": None, "reach": None, "memory": None, "aggregate": True,
    },
    "transnormer": {"norm": "head", "eps": 1e-6},
    "transnormerllm": {"layer": 0, "layers": 1, "positions": None},
    "vig": {"expand_k": 0.5, "expand_v": 1.0, "rank": 16, "tau": 16.0, "cls": False},
}  # fmt: skip

# What stands beside a row's entry in its file.
BESIDE: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
    ("agent-attention", nn.AgentAttention, {"agents": 49, "bias": True, "cls": False, "sr_ratio": 1, "qkv_bias": True}),
    ("based", based.based_window, {"window": 64}),
    ("based", based.GatedConv, {"width": 3, "expand": 1, "bias": False, "conv_bias": False}),
    ("based", based.based_mixers, {"feature_dim": 16, "window": 64}),
    ("deltanet", deltanet.gated_deltanet, {"short_conv": 4, "tau": 16.0}),
    ("galerkin", nn.OperatorAttention, {"kind": "galerkin", "pos_dim": 1, "gain": 1e-2, "delta": 1e-2, "norm": True, "norm_eps": 1e-5}),
    ("galerkin", galerkin.HeadNorms, {"eps": 1e-5}),
    ("lalte", lalte.Router, {"dropout": 0.1, "bias": 0.5}),
    ("lalte", lalte.BudgetController, {"interval": 32, "start": 1e-6, "average": 0.9}),
    (
        "minimax-01",
        minimax_01.MiniMaxConfig,
        {
            "vocab": 256, "dim": 64, "layers": 8, "heads": 4, "kv_heads": 1, "period": 8, "hidden": 96, "experts": 4, "top_k": 2,
            "capacity": None, "alpha": (1.0, 1.0, 1.0), "beta": (1.0, 1.0, 1.0), "rope_base": 10000.0, "patch_dim": None,
        },
    ),
    ("minimax-m1", minimax_m1.cispo_loss, {"eps_low": float("inf"), "eps_high": 0.2, "drop": False}),
    ("minimax-m1", minimax_m1.ppo_loss, {"eps_low": 0.2, "eps_high": 0.2}),
    ("minimax-m1", minimax_m1.grpo_loss, {"eps": 0.2}),
    ("minimax-m1", minimax_m1.repeats, {"limit": 0.99, "run": 3000}),
    ("slab", slab.PRepBN, {"start": 1.0, "warm_up": 0, "eta": 1.0}),
    ("slab", slab.RepBN, {"eta": 1.0, "eps": 1e-5, "momentum": 0.1}),
    (
        "soft",
        nn.SoftmaxFreeAttention,
        {"ratio": 2, "iterations": 20, "symmetric": False, "pool": False, "conv": False, "mode": None, "conv_bias": True},
    ),
    ("transformer-vq", Codebook, {"decay": 0.99, "floor": 0.01}),
    ("transnormer", transnormer.diagonal, {"block_size": 64, "kind": "softmax"}),
    ("transnormer", transnormer.transnormer_layers, {"kind": "T2", "block_size": 64}),
]  # fmt: skip

TURNING = {"performer", "hedgehog", "local-linear-attention"}  # the papers' models rotate q and k before these


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty}


@pytest.mark.parametrize("slug", DEFAULTS)
def test_hyperparameters(slug: str) -> None:
    found = entry(slug).hyperparameters.parameters.values()
    assert {p.name: p.default for p in found if p.default is not p.empty} == DEFAULTS[slug]


@pytest.mark.parametrize(("slug", "function", "expected"), BESIDE, ids=[f"{slug}-{function.__name__}" for slug, function, _ in BESIDE])
def test_what_stands_beside(slug: str, function: Callable[..., Any], expected: dict[str, Any]) -> None:
    assert defaults(function) == expected


@pytest.mark.parametrize("slug", [slug for slug in DEFAULTS if entry(slug).kind == "mechanism" and slug != "agent-attention"])
def test_rotary_positions(slug: str) -> None:
    mechanism = regard.get(slug)
    layer = nn.Attention(16, 2, mechanism, causal=mechanism.can_be_causal, rope=True)
    assert (layer.rope is not None) == (slug in TURNING)


@pytest.mark.parametrize(("name", "shape", "cure"), [("beta", "bhk", "write='delta'"), ("log_decay", "bhk", "decay='head'")])
def test_gla_deltanet_inputs_that_nothing_reads(name: str, shape: str, cure: str) -> None:
    with pytest.raises(regard.RegardError, match=cure):
        regard.algebra.Recurrent(inputs=(regard.algebra.Input(name, shape),))
