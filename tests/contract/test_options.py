"""No hyperparameter is ignored: another value of it changes the layer, its output, or its gradients."""

from __future__ import annotations

import inspect

import pytest
import torch
from layers import LAYERS, MODULES, given, make, tensors

from regard.catalog.registry import entry

# (row, option) -> another value, and what else both layers are made with.
OTHER: dict[tuple[str, str], tuple[object, dict[str, object]]] = {
    ("attentive-survey", "alignment"): ("dot", {}),
    ("attentive-survey", "distribution"): ("sigmoid", {}),
    ("attentive-survey", "positions"): ("soft", {}),
    ("afa", "head_dim"): (6, {}),
    ("afa", "frequencies"): ("rope", {}),
    ("biformer", "regions"): (4, {}),
    ("biformer", "qk_dim"): (8, {}),
    ("biformer", "scale"): (1.0, {}),
    ("biformer", "differentiable"): (True, {"soft": True}),
    ("biformer", "padded"): ("attended", {"regions": 3, "auto_pad": True}),
    ("combiner", "pattern"): ("logsparse", {}),
    ("combiner", "pool"): ("mean", {}),
    ("convit", "scale"): (1.0, {}),
    ("dat", "kv_heads"): (1, {}),
    ("dat", "heads_sa"): (6, {}),
    ("dat", "heads_ra"): (6, {}),
    ("dma", "kv_heads"): (1, {}),
    ("dma", "bias"): ("exp", {}),
    ("dma", "smooth"): (3, {"window": 4}),
    ("dma", "mask"): ("relu", {}),
    ("dma", "head_dim"): (6, {}),
    ("dr-rl", "ranks"): ((3, 5), {}),
    ("dr-rl", "threshold"): (0.0, {}),
    ("dr-rl", "iterations"): (1, {"ranks": (2, 4)}),
    ("dr-rl", "start"): (2, {"threshold": 0.0}),
    ("dr-rl", "svd_gradient"): (True, {"causal": False, "segment": None, "ranks": (2, 4)}),
    ("fftnet", "eps"): (5.0, {}),
    ("fftnet", "activation"): ("gelu", {}),
    ("flash-window-attention", "window"): (2, {"shift": 1}),
    ("gaam", "padding_value"): (0.0, {}),
    ("graph-transformer", "norm"): ("batch", {}),
    ("graph-transformer", "eps"): (0.3, {}),
    ("halonet", "out"): (8, {}),
    ("halonet", "block"): (2, {}),
    ("halonet", "value_dim"): (4, {}),
    ("halonet", "relative"): ("scaled", {}),
    ("halonet", "pool"): (True, {"stride": 2}),
    ("halonet", "stride"): (2, {}),
    ("halonet", "steps"): ("queries", {"stride": 2}),
    ("hgf", "mode"): ("ternary", {}),
    ("hgf", "rank"): (2, {}),
    ("hgf", "gate"): ("channel", {}),
    ("kernelized-attention-rpe", "axes"): (2, {"reach": 4}),
    ("lalte", "kv_heads"): (1, {}),
    ("latent-monotonic-attention", "context"): ("window", {}),
    ("latent-monotonic-attention", "width"): (3, {"context": "window"}),
    ("longvq", "hdim"): (8, {}),
    ("mega", "hdim"): (8, {}),
    ("mega", "chunk"): (4, {}),
    ("mega", "attn"): ("laplace", {}),
    ("mega", "positions"): ("rotary", {}),
    ("mega", "norm"): ("rms", {}),
    ("mega", "truncation"): (2, {}),
    ("mosa", "window"): (3, {}),
    ("mta", "keys"): (5, {}),
    ("mta", "pre_mix"): (0, {}),
    ("mta", "post_mix"): (0, {}),
    ("mta", "depth"): (3, {}),
    ("mta", "post_queries"): (3, {}),
    ("mta", "post_keys"): (5, {}),
    ("mta", "side"): ("left", {}),
    ("mta", "head_dim"): (6, {}),
    ("mta", "kv_heads"): (1, {}),
    ("nats", "kv_heads"): (1, {}),
    ("recurrent-memory-transformer", "bptt"): (1, {}),
    ("recurrent-memory-transformer", "rope_bases"): ((100.0, 1000.0), {}),
    ("sea", "causal"): (True, {"cells": 8}),
    ("seerattention", "heads"): (2, {}),
    ("seerattention", "kv_heads"): (4, {}),
    ("seerattention", "width"): (4, {}),
    ("seerattention", "block_size"): (2, {"threshold": 0.5}),
    ("seerattention", "threshold"): (0.9, {}),
    ("seerattention", "ratio"): (0.4, {}),
    ("seerattention", "last_dense"): (1, {"threshold": 0.9}),
    ("seerattention", "q_pools"): (("max",), {"threshold": 0.4}),
    ("seerattention", "k_pools"): (("avg",), {"threshold": 0.4}),
    ("seerattention", "rope"): (False, {}),
    ("set-transformer", "dim"): (8, {}),
    ("sla", "top"): (0.7, {}),
    ("sla", "bottom"): (0.5, {}),
    ("sla", "feature"): ("elu", {}),
    ("sla", "over"): ("all", {}),
    ("sparsifiner", "scale"): (5.0, {}),
    ("sparsifiner", "reduction"): (4, {}),
    ("sparsifiner", "estimate_threshold"): (0.1, {}),
    ("sparsifiner", "coefficient_threshold"): (0.3, {}),
    ("sparsifiner", "basis_threshold"): (0.3, {}),
    ("ssa", "kv_heads"): (1, {}),
    ("ssa", "head_dim"): (6, {}),
    ("super-attention", "kind"): ("optimised", {}),
    ("super-attention", "start"): ("eye", {}),
    ("superlinear-attention", "kv_heads"): (1, {}),
    ("transformer-vq", "key_dim"): (4, {}),
    ("transformer-vq", "value_dim"): (8, {}),
    ("transformer-vq", "reach"): (1, {}),
    ("transformer-vq", "memory"): (2, {}),
    ("twins", "scale"): (1.0, {}),
    ("variational-attention", "mode"): ("sample", {}),
    ("variational-attention", "score"): ("bilinear", {}),
    ("variational-attention", "baseline"): (False, {"mode": "sample"}),
    ("variational-attention", "samples"): (3, {"mode": "sample"}),
    ("variational-attention", "temperature"): (2.0, {"mode": "gumbel"}),
    ("variational-attention", "floor"): (0.4, {"mode": "dirichlet"}),
    ("variational-attention", "leave_one_out"): (True, {"samples": 3, "mode": "wake_sleep"}),
    ("a2n", "plain_kernel"): (5, {}),
    ("acm", "act"): ("relu", {}),
    ("acm", "out"): (12, {}),
    ("acm", "dropout"): (0.5, {}),
    ("acm", "gate_depth"): (1, {}),
    ("acm", "gate_act"): ("tanh", {}),
    ("acm", "tau"): (None, {}),
    ("acmil", "masked"): (2, {}),
    ("acmil", "share"): (1.0, {"masked": 2}),
    ("attention-cl", "weights"): ("sigmoid", {}),
    ("bipft", "dropout"): (0.5, {}),
    ("cbam", "pools"): (("avg",), {}),
    ("cbam", "order"): ("parallel", {}),
    ("cbam", "kernel"): (3, {}),
    ("cbam", "spatial_pools"): (("avg",), {}),
    ("ela", "variant"): ("S", {}),
    ("ela", "kernel"): (5, {}),
    ("ela", "group"): (8, {}),
    ("ela", "norm_groups"): (4, {}),
    ("fixed-head-size", "rope"): (True, {"head_size": 6}),
    ("icl-linear-regression", "normalizer"): ("linear", {}),
    ("icl-linear-regression", "std"): (0.5, {}),
    ("lama", "context"): ("mean", {}),
    ("little-attention-block", "reduction"): (8, {}),
    ("little-attention-block", "kernel"): (5, {}),
    ("litv2-hilo", "scale"): (1.0, {}),
    ("contmix", "kernel"): (7, {}),
    ("contmix", "small"): (5, {}),
    ("contmix", "scale"): (0.5, {}),
    ("contmix", "on_stream"): (True, {"scale": 0.5}),
    ("contmix", "std"): (0.5, {}),
    ("mamba-yolo", "rank"): (2, {}),
    ("mamba-yolo", "kernel"): (5, {}),
    ("mamba-yolo", "rank_ratio"): (1.0, {}),
    ("mambaout", "kernel"): (5, {}),
    ("mha-memorization-capacity", "model_dim"): (12, {}),
    ("mha-memorization-capacity", "weights"): ("sigmoid", {}),
    ("mha-memorization-capacity", "scale"): (1.0, {}),
    ("moh", "head_dim"): (4, {}),
    ("moment-probing", "proj"): (64, {}),
    ("moment-probing", "heads"): (2, {}),
    ("moment-probing", "pairs"): ("all", {}),
    ("hyperzzw", "kernels"): ((3, 5, 5, 3), {}),
    ("hyperzzw", "hidden"): ((4, 4, 4, 4, 6), {}),
    ("hyperzzw", "groups"): (2, {}),
    ("mossformer", "qk_dim"): (12, {}),
    ("mossformer", "norm"): ("layernorm", {}),
    ("mossformer", "kernel"): (5, {}),
    ("mossformer", "rotary"): (2, {}),
    ("mqsa-ted", "hidden"): (12, {}),
    ("polarized-attention", "layout"): ("sequential", {}),
    ("rank-one-universal", "direction"): (torch.linspace(-1, 1, 16), {}),
    ("rank-one-universal", "out"): (torch.linspace(-1, 1, 16).sin(), {}),
    ("sentence-attention-block", "norm"): ("sigmoid", {}),
    ("show-attend-tell", "attention"): ("hard", {}),
    ("show-attend-tell", "sampled"): (0.0, {"attention": "hard", "sampled": 1.0}),
    ("show-attend-tell", "reads"): ("argmax", {"attention": "hard"}),
    ("twins", "dims"): ((8, 12), {}),
    ("twins", "depths"): ((2, 1), {}),
    ("twins", "heads"): ((2, 4), {}),
    ("twins", "windows"): ((2, 3), {}),
    ("twins", "reductions"): ((1, 1), {}),
    ("twins", "ratios"): ((2, 3), {}),
    ("ulsam", "groups"): (2, {}),
    ("ulsam", "pool"): (5, {}),
    ("van-lka", "kernel"): (9, {}),
    ("csa", "kernel"): (5, {}),
    ("csa", "fuse"): ("sum", {}),
    ("van-lka", "dilation"): (5, {"kernel": 25}),
}
# What changes nothing that these calls can show, with the reason.
SILENT: dict[tuple[str, str], str] = {
    ("dr-rl", "policy"): "a module of the caller's: the row's tests",
    ("dr-rl", "explore"): "of draws in training, which the seed may not tell apart: the row's checks",
    ("hyperzzw", "side"): "another call: the map's size",
    ("hyperzzw", "earlier"): "another call, with earlier blocks' maps: the row's checks",
    ("contmix", "first"): "a later block takes a third map: the row's checks",
    ("acm", "detach"): "of `outputs`, which the first stage trains: the row's checks",
    ("biformer", "auto_pad"): "other sizes are refused without it: the row's checks",
    ("biformer", "layout"): "the order of the input's dimensions: tests/golden",
    ("fftnet", "seq_len"): "other lengths interpolate the filter: the row's checks",
    ("flash-window-attention", "flash"): "the same numbers another way: the row's checks",
    ("flash-window-attention", "chunk"): "the same numbers in other pieces",
    ("gaam", "padding_value"): "no entry here is padding: the row's checks",
    ("gin-attention", "mlp"): "a module of the caller",
    ("graph-transformer", "edge_stream"): "another call, with edge features: the row's checks",
    ("kernelized-attention-rpe", "heads"): "another call: shapes of q, k, v",
    ("kernelized-attention-rpe", "head_dim"): "another call: shapes of q, k, v",
    ("kernelized-attention-rpe", "axes"): "another call, on a grid: the row's checks",
    ("lalte", "sinks"): "hardly a token is evicted here: the row's checks",
    ("lalte", "budget"): "places when decoding: the row's checks",
    ("landmark-attention", "top_blocks"): "decoding: the row's checks",
    ("landmark-attention", "places"): "decoding: the row's checks",
    ("landmark-attention", "selection"): "decoding: the row's checks",
    ("longvq", "block"): "the same numbers in other pieces",
    ("minimax-01", "config"): "sizes of a whole model",
    ("sea", "heads"): "another call: shapes of q, k, v",
    ("sea", "head_dim"): "another call: shapes of q, k, v",
    ("sea", "max_len"): "the longest call",
    ("seerattention", "heads"): "another call: shapes of q, k, v",
    ("seerattention", "kv_heads"): "another call: shapes of q, k, v",
    ("seerattention", "head_dim"): "another call: shapes of q, k, v",
    ("attention-cl", "spatial"): "another call: the clip's size",
    ("icl-linear-regression", "tasks"): "another call: shapes of y",
    ("mqsa-ted", "tau"): "of the losses: the row's checks",
    ("mqsa-ted", "eps"): "below rounding here: the row's checks",
    ("sla", "head_dim"): "another call: shapes of q, k, v",
    ("ssa", "select"): "a mechanism of the caller",
    ("vig", "cls"): "another call, with a class token: the row's checks",
}
WIDTHS = {
    "dim",
    "dim_in",
    "inputs",
    "tokens",
    "length",
    "channels",
    "colours",
    "d_model",
    "features",
    "text_dim",
    "sem",
    "feat",
    "context_dim",
}  # of the inputs: what does not fit is refused


def other_value(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return 0.5 * value if value else 0.25
    return None


def layer_cases():
    for name in MODULES:
        for option, parameter in inspect.signature(LAYERS[name].factory or entry(name).factory).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD or option in WIDTHS or (name, option) in SILENT or option == "inner":
                continue
            old = LAYERS[name].options.get(option, parameter.default)
            value, common = OTHER.get((name, option)) or (2 * old if option == "heads" else other_value(old), {})
            yield pytest.param(name, option, value, common, id=f"{name}-{option}")


def seen(layer, inputs):
    """What can be told of a layer from outside: its parameters' shapes, its outputs in training and in evaluation, its gradients."""
    torch.manual_seed(3)
    trained = tensors(layer.train()(*inputs))
    weighed = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)).sum() for x in trained)
    leaves = [*layer.parameters()] if getattr(weighed, "requires_grad", False) else []
    grads = torch.autograd.grad(weighed, leaves, allow_unused=True, materialize_grads=True) if leaves else ()
    torch.manual_seed(3)
    shapes = {key: tuple(x.shape) for key, x in layer.state_dict().items()}
    return shapes, [*trained, *grads, *tensors(layer.eval()(*inputs))]


@pytest.mark.parametrize(("name", "option", "value", "common"), layer_cases())
def test_layers_heed(name, option, value, common):
    first, second = make(name, **common).double(), make(name, **{**common, option: value}).double()
    inputs = tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given(name))
    for layer in (first, second):  # first values of zero would hide what they multiply
        torch.manual_seed(4)
        for p in layer.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
    a, b = seen(first, inputs), seen(second, inputs)
    if a[0] == b[0]:
        same = all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))
        assert not same, f"{option}={value!r} changes nothing"
