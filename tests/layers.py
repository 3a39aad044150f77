"""A small layer of every row that is one, with what it is called with: made once for the contracts of layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import entry, names

LENGTH = 12
Inputs = Callable[[int, int], tuple[Any, ...]]  # (batch, length) -> what forward takes


def tokens(dim: int = 16) -> Inputs:
    return lambda batch, length: (torch.randn(batch, length, dim),)


def image(*shape: int) -> Inputs:
    return lambda batch, length: (torch.randn(batch, *shape),)


def heads(count: int = 2, kv: int | None = None, dim: int = 8) -> Inputs:
    return lambda batch, length: tuple(torch.randn(batch, c, length, dim) for c in (count, kv or count, kv or count))


@dataclass(frozen=True)
class Layer:
    """options: of the constructor. inputs: what forward takes. causal: whether outputs read earlier tokens alone. length: tokens that
    fit. batched: whether rows of a batch are apart in evaluation. first: the call's shortest length. channels: the dimension whose size
    is the layer's."""

    options: dict[str, Any]
    inputs: Inputs = tokens()
    causal: bool = False
    length: int = LENGTH
    shortest: int = 1
    call: dict[str, Any] = field(default_factory=dict)
    factory: Callable[..., nn.Module] | None = None
    channels: int = -1


def flux(**options: Any) -> nn.Module:
    from regard.nn import Attention
    from regard.zoo.sparse.flux_attention import FluxAttention

    return FluxAttention(Attention(16, 2), **options)


def minimax(**options: Any) -> nn.Module:
    from regard.zoo.linear.minimax_01 import MiniMaxConfig, MiniMaxLike

    return MiniMaxLike(MiniMaxConfig(vocab=20, dim=16, layers=2, heads=2, period=2, hidden=8, experts=2, **options))


def vit(depth: int = 2, classes: int = 3) -> nn.Module:
    from regard.nn.images import timm_host

    made = timm_host.load("timm").models.vision_transformer.VisionTransformer
    return made(img_size=8, patch_size=4, embed_dim=16, depth=depth, num_heads=2, mlp_ratio=2.0, num_classes=classes)  # type: ignore[no-any-return]


def prompted(**options: Any) -> nn.Module:
    from regard.zoo.vision.gated_prompt_tuning import GatedPromptTuner

    return GatedPromptTuner(vit(), **options)


def coordinated(**options: Any) -> nn.Module:
    from regard.zoo.vision.tcpa import TCPA

    return TCPA(vit(), 3, **options)


def dual(**options: Any) -> nn.Module:
    from regard.zoo.vision.dcal import DCAL

    return DCAL(vit(classes=0), 3, **options)


def two_stages(**options: Any) -> nn.Module:
    from regard.zoo.vision.ifam import TwoStageFaithful

    return TwoStageFaithful(vit(classes=0), vit(classes=0), 3, 2, draws="training", **options)


def registered(**options: Any) -> nn.Module:
    from regard.zoo.vision.test_time_registers import TestTimeRegisters

    return TestTimeRegisters(vit(), {0: [3, 7], 1: [2]}, **options)


def told(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 16, 6, 7), torch.randn(batch, 8)


def overviewed(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 16, 6, 7), torch.randn(batch, 6, 6, 7)


def captions(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, length, 16), torch.arange(4 * batch).reshape(batch, 4) * 3 % 5


def clips(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 16, length), torch.randn(batch, 5, length)


def relational(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, length, 16), torch.randn(batch, length, 16)


def graph(batch: int, length: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(batch * length)
    return torch.randn(batch * length, 16), torch.stack((torch.cat((at, at)), torch.cat((at, at // length * length))))


def alignment(batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 16), torch.randn(batch, length, 16), torch.arange(batch) % 5


def transduction(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, length, 6), torch.arange(3).expand(batch, -1) % 5


def bytes_of(batch: int, length: int) -> tuple[Tensor]:
    return (torch.arange(batch * length).reshape(batch, length) * 7 % 20,)


def grid(batch: int, length: int) -> tuple[Tensor, tuple[int, int]]:
    return torch.randn(batch, length, 16), (length // 4, 4)


SMALL = {"dim": 16, "heads": 2}
LAYERS: dict[str, Layer] = {
    "a2n": Layer({"scale": 2, "width": 32, "up_width": 4, "blocks": 2, "temperature": 0.5}, image(3, 6, 5), channels=1),
    "acm": Layer({"dim": 16, "learners": 3, "block": 6, "gate_hidden": 8}),
    "attentive-survey": Layer(
        {"dim": 16, "alignment": "additive", "positions": "local-p"},
        lambda batch, length: tuple(torch.randn(batch, length, 16) for _ in range(3)),
    ),
    "acmil": Layer({"features": 16, "classes": 3, "dim": 8, "hidden": 5, "branches": 3, "masked": 0}),
    "activator": Layer({"dim": 16, "hidden": 24}),
    "afa": Layer(SMALL, causal=True),
    "attention-cl": Layer({"channels": 6, "hidden": 5, "spatial": (4, 3)}, image(3, 6, 4, 3), channels=2),
    "biformer": Layer({**SMALL, "regions": 2, "top_k": 2}, image(8, 8, 16)),
    "bipft": Layer(SMALL),
    "cbam": Layer({"channels": 16, "reduction": 4}, image(16, 6, 7), channels=1),
    "combiner": Layer({**SMALL, "seg_len": 4}, causal=True),
    "contmix": Layer({"dim": 16, "context_dim": 6, "kernel": 5, "small": 3, "pool": 3}, overviewed, channels=1),
    "convit": Layer({"dim": 16, "heads": 4}, grid, shortest=4),
    "csa": Layer({"sem": 5, "feat": 16, "fuse": "concat"}, clips, channels=1),
    "dat": Layer({"dim": 16, "heads_sa": 2, "heads_ra": 2}, relational, causal=True),
    "dcal": Layer({"ratio": 0.5}, image(3, 8, 8), channels=1, factory=dual),
    "dependencyvit": Layer({**SMALL, "temperature": 1.0}),
    "dma": Layer({**SMALL, "window": 6}, causal=True),
    "ela": Layer({"channels": 16}, image(16, 6, 7), channels=1),
    "dr-rl": Layer({**SMALL, "ranks": (2, 4, 6), "segment": 4, "causal": True}, causal=True),
    "fftnet": Layer({**SMALL, "seq_len": LENGTH}),
    "flash-window-attention": Layer({**SMALL, "window": 4, "shift": 2}, image(8, 8, 16)),
    "flux-attention": Layer({"sinks": 1, "window": 4, "ends": 2}, causal=True, factory=flux),
    "gaam": Layer({"heads": 2}),
    "gated-prompt-tuning": Layer({"prompts": 3, "classes": 3, "gate_init": 0.5}, image(3, 8, 8), channels=1, factory=prompted),
    "ifam": Layer({"dropout": 0.0, "mask_dropout": 0.0}, image(3, 8, 8), channels=1, factory=two_stages),
    "hyperzzw": Layer(
        {
            "channels": 4,
            "side": 6,
            "factor": 3,
            "kernels": (3, 3, 5, 3),
            "hidden": (4, 4, 4, 4, 4),
            "groups": 4,
            "omega": 1.0,
            "dropout": 0.0,
        },
        image(4, 6, 6),
        channels=1,
    ),
    "gin-attention": Layer(SMALL, causal=True),
    "graph-transformer": Layer({**SMALL, "norm": "layer"}, graph),
    "halonet": Layer({"dim": 16, "heads": 2, "block": 4, "halo": 1, "head_dim": 8}, image(16, 8, 8), channels=1),
    "kernelized-attention-rpe": Layer({"heads": 2, "head_dim": 8, "features": 16, "reach": 16}, heads()),
    "lalte": Layer({**SMALL, "window": 6, "sinks": 1, "budget": 32}, causal=True),
    "hgf": Layer({**SMALL, "differential": True}, causal=True),
    "lama": Layer(SMALL),
    "landmark-attention": Layer({**SMALL, "block": 3}, causal=True),
    "latent-monotonic-attention": Layer({"inputs": 6, "classes": 5, "dim": 16}, transduction, shortest=4),
    "little-attention-block": Layer({"channels": 16}, image(16, 6, 7), channels=1),
    "litv2-hilo": Layer({"dim": 16, "heads": 4}, grid, shortest=4),
    "longvq": Layer({"dim": 16, "codes": 8, "zdim": 8, "window": 4}, causal=True),
    "mamba-yolo": Layer({"dim": 16, "state": 4}, image(16, 5, 7), channels=1),
    "mambaout": Layer({"dim": 16, "ssm": True, "state": 4}, image(4, 3, 16)),
    "mega": Layer({"dim": 16, "zdim": 8, "ndim": 4}, causal=True),
    "minimax-01": Layer({}, bytes_of, causal=True, factory=minimax),
    "moh": Layer({"dim": 16, "heads": 8, "shared": 2, "routed": 2, "causal": True}, causal=True),
    "moment-probing": Layer({"dim": 16, "classes": 3, "proj": 32}),
    "mossformer": Layer({"dim": 16, "group": 4, "qk_dim": 8, "causal": True, "kernel": 3, "rotary": 4}, causal=True),
    "mosa": Layer({"dim": 16, "sparse": 2, "dense": 1, "head_dim": 8, "sparsity": 2}, shortest=4),
    "mqsa-ted": Layer({"items": 25, "dim": 8, "length": LENGTH}, lambda batch, length: (bytes_of(batch, length)[0] + 1,), causal=True),
    "mta": Layer(SMALL, causal=True),
    "nats": Layer({**SMALL, "window": 4}, causal=True),
    "ninformer": Layer({"dim": 16, "tokens": LENGTH, "token_hidden": 8, "channel_hidden": 24}),
    "polarized-attention": Layer({"channels": 16}, image(16, 6, 7), channels=1),
    "rcmha": Layer(SMALL),
    "recurrent-memory-transformer": Layer({**SMALL, "chunk": 4, "slots": 3}, causal=True),
    "sea": Layer({"heads": 2, "head_dim": 8, "cells": 6, "keys": 4, "max_len": 32, "features": 8}, heads()),
    "seerattention": Layer({"heads": 4, "kv_heads": 2, "head_dim": 8, "width": 8, "block_size": 4}, heads(4, 2), causal=True),
    "benefits-of-rank": Layer(
        {"dim": 16, "rank": 3, "heads": 2}, lambda batch, length: (torch.randn(batch, 16, length), torch.randn(batch, 16, 3)), channels=1
    ),
    "fixed-head-size": Layer({"d_model": 16, "heads": 3, "head_size": 5, "causal": True}, causal=True),
    "mha-memorization-capacity": Layer(
        {"dim": 16, "heads": 3, "key_dim": 4, "value_dim": 2, "outputs": 5},
        lambda batch, length: (torch.randn(batch, 16), torch.randn(batch, length, 16)),
    ),
    "rank-one-universal": Layer({"dim": 16}, lambda batch, length: (torch.randn(batch, 16, length),), channels=1),
    "icl-linear-regression": Layer(
        {"dim": 16, "heads": 2},
        lambda batch, length: (torch.randn(batch, length, 16), torch.randn(batch, length, 1), torch.randn(batch, 16)),
    ),
    "sentence-attention-block": Layer({"text_dim": 8, "channels": 16}, told, channels=1),
    "set-transformer": Layer({"dim_in": 16, "dim_out": 5, "dim": 16, "heads": 2, "inducing": 3}),
    "show-attend-tell": Layer(
        {"vocab": 5, "features": 16, "hidden": 8, "embed": 6, "deep_attention": 2, "deep_start": 2, "deep_readout": 2, "selector": True},
        captions,
    ),
    "sla": Layer({"head_dim": 8, "top": 0.4, "bottom": 0.2, "block_size": 4}, heads()),
    "spa": Layer(SMALL),
    "sparsifiner": Layer({**SMALL, "tokens": LENGTH, "rank": 4}),
    "ssa": Layer({**SMALL, "block_size": 4, "top_k": 2}, causal=True),
    "super-attention": Layer({**SMALL, "length": LENGTH}),
    "superlinear-attention": Layer({**SMALL, "skip": 1}, causal=True),
    "tcpa": Layer(
        {"own": {"size": 4, "length": 1, "top": 2}, "shared": {"size": 4, "length": 2, "top": 4}},
        image(3, 8, 8),
        channels=1,
        factory=coordinated,
    ),
    "test-time-registers": Layer({}, image(3, 8, 8), channels=1, factory=registered),
    "transformer-vq": Layer({"dim": 16, "heads": 2, "codes": 8, "block": 4}, causal=True),
    "tropical-attention": Layer(SMALL),
    "twins": Layer(
        {"dims": (8, 16), "depths": (2, 2), "heads": (2, 2), "windows": (2, 2), "reductions": (2, 1), "ratios": (2, 2)},
        image(3, 24, 20),
        channels=1,
    ),
    "ulsam": Layer({"channels": 16}, image(16, 6, 7), channels=1),
    "van-lka": Layer({"channels": 16}, image(16, 6, 7), channels=1),
    "variational-attention": Layer({"dim": 16, "classes": 5, "mode": "exact"}, alignment),
    "vig": Layer(SMALL, grid, shortest=4),
}


def is_layer(name: str) -> bool:
    factory = entry(name).factory
    return inspect.isclass(factory) and issubclass(factory, nn.Module)


MODULES = [name for name in names("module") if is_layer(name)]


def make(name: str, start: int = 0, /, **options: Any) -> nn.Module:
    """A row's layer; start: the seed of its first values."""
    layer = LAYERS[name]
    torch.manual_seed(start)
    factory = layer.factory or entry(name).factory
    return factory(**{**layer.options, **options})  # type: ignore[no-any-return]


def given(name: str, batch: int = 2, length: int | None = None, seed: int = 1) -> tuple[Any, ...]:
    torch.manual_seed(seed)
    return LAYERS[name].inputs(batch, length or LAYERS[name].length)


def tensors(out: Any) -> list[Tensor]:
    """The floating tensors of an output, whatever it is."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    if isinstance(out, (tuple, list)):
        return [x for one in out for x in tensors(one)]
    return [x for one in vars(out).values() for x in tensors(one)] if hasattr(out, "__dict__") else []
