"""What a call without arguments runs: the settings of the papers, or of the released code where the paper gives none."""

from __future__ import annotations

import importlib
import inspect
import math
from typing import Any

import pytest

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "alternating-sparse-attention": {
        "LocalLatentAttention": {"rank": 64, "rope_dim": 16, "window": 512},
        "GlobalLatentAttention": {"groups": 1, "rank": None, "size": 32, "stride": 16, "block_size": 64, "top_k": 16, "fix_gates": None},
        "asa_layers": {"window": 512, "groups": 1, "rank": None, "rope_dim": 16, "size": 32, "stride": 16, "block_size": 64, "top_k": 16},
    },
    "attention-engine": {"AttentionEngine.tuned": {"candidates": 4}, "attention_engine": {"scale": None, "device": "cpu"}},
    "attention-nas": {
        "evolve": {"population": 32, "rounds": 20, "seed": 0, "mutation": 0.15},
        "attention_search": {"steps": 300, "scored": 24, "final_steps": 300, "seed": 0, "lr": 3e-3},
        "train": {"lr": 3e-3},
    },
    "biformer": {
        "BiLevelRoutingAttention": {
            "heads": 8, "regions": 7, "top_k": 4, "qk_dim": None, "scale": None, "lepe": 5, "soft": False, "differentiable": False,
            "auto_pad": False, "param_routing": False, "padded": "hidden", "layout": "nhwc",
        },
        "BiFormerBlock": {"regions": 7, "top_k": 4, "ratio": 3},
        "BiFormer": {
            "channels": 3, "widths": (16, 32), "depths": (1, 1), "top_ks": (1, 4), "regions": 2, "head_dim": 8, "ratio": 3, "stem": 4,
        },
    },
    "dbsa": {
        "BM25": {"k1": 1.5, "b": 0.75},
        "group_mask": {"anchors": 1, "previous": 2},
        "DemonstrationCache": {"anchors": 1, "previous": 2, "selected": 5, "reposition": True},
        "many_shot_task": {"groups": 16, "per_group": 6, "words": 2, "labels": 8, "queries": 32},
    },
    "delta-attention": {"delta_attention": {"stride": 64, "mode": "delta"}},
    "dhsa": {
        "dhsa": {
            "budget": 1024, "block_size": 32, "local": 64, "first": 0, "dense_last": 0, "chunk": 16, "boundaries": "cosine", "decode": True,
            "pool": "norm", "window": None,
        },
        "BoundaryPredictor": {"width": 4, "hidden": 256, "pool": "conv", "inner": 256, "heads": 4},
        "mass_ratio": {"width": 4, "rows": None, "eps": 1e-6},
        "boundary_loss": {"alpha": 4.0, "beta": 0.0, "gamma": 2.0, "eps": 1e-6},
        "choose_boundaries": {"distance": 8, "forced": (), "instruction": None},
    },
    "dma": {
        "DynamicMaskAttention": {
            "kv_heads": None, "window": 2048, "bias": "linear", "rope": True, "smooth": 0, "mask": "topk", "head_dim": None, "base": 1e4,
            "norm_eps": 1e-6, "dt_bias": True,
        }
    },
    "draftattention": {"draft": {"pool": (8, 16), "sparsity": 0.75, "every_row": True, "text": 0}, "schedule": {"dense_steps": 10, "dense_layers": 0}},
    "flash-window-attention": {
        "window_attention": {"scale": None, "chunk": 16},
        "SwinWindowAttention": {"window": 7, "shift": 0, "flash": True, "chunk": 16},
    },
    "flashmoba": {
        "moba_snr": {"related": 1, "cluster": 0.0, "noise": 0.0},
        "routing_trial": {"related": 1, "trials": 20000, "seed": 0},
        "KeyConv": {"width": 3},
        "flash_top_k": {"tile": 64},
        "flash_moba": {"block_size": 128, "top_k": 8, "lengths": None, "scale": None},
    },
    "flexprefill": {
        "flexprefill": {"gamma": 0.9, "tau": 0.1, "min_budget": 512, "max_budget": None, "block_size": 128, "count_size": 128}
    },
    "flux-attention": {
        "LayerRouter": {"ends": 100, "start": 4.5},
        "FluxAttention": {"sinks": 128, "window": 1024, "ends": 100, "sparse": None, "full": None},
        "temperature": {"high": 1.0, "low": 0.3},
        "SparsityController.forward": {"warm": 1.0},
        "train_router": {"lr": 5e-4, "controller_lr": 1e-3, "lm_weight": 1.0},
    },
    "fused-neighborhood": {
        "neighborhood_attention": {
            "dilation": 1, "is_causal": False, "scale": None, "backend": "fused", "bias": None, "return_lse": False,
        },
        "NeighborhoodAttention2D": {"kernel_size": 7, "dilation": 1, "causal": False, "bias": False},
    },
    "halonet": {
        "HaloAttention2d": {
            "heads": 8, "block": 8, "halo": 3, "stride": 1, "head_dim": 16, "masked": True, "relative": "unscaled", "bias": False,
            "project": False, "pool": False, "steps": "pixels",
        },
        "HaloBlock": {"ratio": 2, "heads": 4, "block": 8, "halo": 3, "stride": 1},
        "HaloNet": {"channels": 3, "widths": (32, 64), "block": 4, "halo": 1},
    },
    "hip": {
        "hip": {
            "mask_k": 512, "block_q": 32, "block_k": 2, "sinks": 4, "window": 64, "query_stride": 2, "representative": "first",
        },
        "CachedHip": {"refresh": 8, "mask_k": 512, "block_k": 2, "sinks": 4, "window": 64, "representative": "first"},
    },
    "hylra": {
        "largest": {"first": 0},
        "plan": {"sensitivity": None, "weight": 0.1, "full_cost": 1.0, "reuse_cost": 0.1, "threshold": math.inf},
        "top_indices": {"sinks": 4, "recent": 16},
        "ReuseLayers": {"block": 64, "sinks": 4, "recent": 16, "weight": 0.1},
    },
    "hyperattention": {
        "hyper": {
            "block_size": 256, "samples": 256, "hash_bits": 7, "min_length": 4096, "seed": 0, "buckets": "adjacent", "zero_keys": False,
        },
        "hyper_attention": {
            "causal": False, "block_size": 256, "samples": 256, "hash_bits": 7, "min_length": 4096, "seed": 0, "scale": None,
            "buckets": "adjacent", "zero_keys": False, "directions": None, "draws": None,
        },
        "angular_order": {"buckets": "adjacent"},
    },
    "landmark-attention": {
        "LandmarkAttention": {
            "block": 63, "rope": True, "top_blocks": None, "places": "near", "selection": "token_and_head", "bias": False,
        }
    },
    "longheads": {"LongHeads": {"chunk": 256, "attend_len": 4096, "released": False}},
    "ltri-llm": {
        "LtriStream": {"window": 1024, "sinks": 4, "top": 16, "budget": 1024, "shortest": 4, "longest": 40},
        "SpanIndex": {"heads": None, "resident_after": 8, "device": "cpu"},
        "Ltri": {"chunk": 128},
        "leaks": {"rows": 8},
        "compactness": {"eps": 0.004},
        "find_spans": {"shortest": 4, "longest": 40, "overlap": 0.1},
    },
    "minicpm-sala": {
        "infllm": {"block_size": 64, "top_k": 64, "window": 2048, "dense_len": 8192, "kernel": 32, "stride": 16},
        "infllm_scores": {"kernel": 32, "stride": 16},
        "SALAConfig": {
            "vocab": 256, "dim": 64, "layers": 8, "heads": 4, "kv_heads": 2, "share": 0.25, "block_size": 64, "top_k": 64, "window": 2048,
            "dense_len": 8192, "kernel": 32, "stride": 16,
        },
        "sala_lightning": {"layer": 0, "layers": 1},
        "softmax_layers": {"share": 0.25, "scores": None},
        "train_stages": {"steps": (60, 60), "lr": 1e-3, "long": None},
    },
    "moba": {"moba": {"block_size": 512, "top_k": 3}},
    "mosa": {
        "MoSA": {"dense": 0, "head_dim": 64, "sparsity": 16, "first": False, "rope_share": 0.5, "rope_base": 1e4, "window": None},
    },
    "nabla": {"nabla": {"patch": 8, "thr": 0.7, "tile_window": None, "text": 0}},
    "nats": {"NAtSAttention": {"kv_heads": None, "window": 64, "tau": 1.0}},
    "neighborhood": {"neighborhood": {"kernel": 13, "stride": 1, "dilation": 1, "causal": False, "extra": 0}, "simulate": {"causal": False}},
    "pbs-attn": {"pbs": {"threshold": 0.9, "block_size": 128, "segment": 256, "first": True}},
    "powerattention": {
        "power": {"block_size": 256, "window_blocks": 5, "sink_blocks": 1},
        "blocks_read": {"window_blocks": 0, "sink_blocks": 0},
        "longnet": {"segments": (2048, 4096, 8192), "rates": (1, 2, 4)},
    },
    "proxyattn": {"proxyattn": {"groups": None, "gamma": 0.95, "block_size": 128, "stride": 8, "min_blocks": 1}},
    "psa": {
        "psa": {
            "mode": "topk", "ranges": None, "block_size": 128, "sample": 32, "similarity": None, "text": 0, "causal": False, "seed": 0,
            "tile": 32, "floor": 0.06, "tail": "counted",
        },
        "levels_of": {"per_tile": 8, "floor": 0.06},
    },
    "recurrent-memory-transformer": {
        "RecurrentMemoryBlock": {
            "chunk": 128, "slots": 16, "written": 1, "use_global": False, "bptt": None, "rope_bases": (1e3, 1e5),
        }
    },
    "routing-transformer": {
        "routing": {"clusters": 8, "members": None, "shared": False, "form": "paper"},
        "update_centroids": {"decay": 0.999, "form": "paper"},
        "commitment_loss": {"weight": 1e-4, "form": "paper"},
        "RoutingAttention": {"members": None, "routed": None, "window": 256, "causal": True, "decay": 0.999, "commitment": 1e-4},
    },
    "sampleattention": {
        "sampleattention": {"alpha": 0.95, "row_ratio": 0.05, "window_ratio": 0.08},
        "tune": {"alphas": (0.8, 0.9, 0.95, 0.98), "target": 0.95, "row_ratio": 0.05, "window_ratio": 0.08},
    },
    "seerattention": {
        "AttnGate": {
            "width": 128, "block_size": 64, "rope": True, "q_pools": ("avg",), "k_pools": ("max", "min", "avg"), "map_q": True, "base": 1e4,
        },
        "SeerAttention": {
            "width": 128, "block_size": 64, "threshold": 2e-3, "ratio": None, "last_dense": 0, "rope": True, "q_pools": ("avg",),
            "k_pools": ("max", "min", "avg"), "map_q": True, "base": 1e4,
        },
        "block_maxima": {"normalise": True, "scale": None, "causal": True},
        "gate_loss": {"skip": 0.25},
    },
    "sla": {"SparseLinearAttention": {"top": 0.05, "bottom": 0.1, "block_size": 64, "feature": "softmax", "over": "marginal"}},
    "spargeattn": {
        "sparge": {
            "theta": None, "tau": 0.98, "block_q": 128, "block_k": 64, "ratio": None, "first": False, "causal": False, "smooth": True,
        },
        "sparge_attention": {
            "causal": False, "theta": 0.6, "tau": 0.98, "pv_lambda": None, "quant": None, "block_q": 128, "block_k": 64, "scale": None,
        },
        "SpargeTuner": {"causal": False, "l1": 0.07, "pv_l1": 0.08, "grid": 1 / 16, "block_q": 128, "block_k": 64, "worthwhile": 0.1},
    },
    "sparse-transformer": {
        "sparse_transformer": {"pattern": "fixed", "stride": 128, "count": 32, "integration": "merged", "layer": 0},
        "SparseBlock": {"mechanism": "sparse-transformer", "layers": 1, "dropout": 0.0, "recompute": False},
    },
    "sparsifiner": {
        "SparsifinerAttention": {
            "rank": None, "keep": 0.25, "basis_threshold": 0.0, "coefficient_threshold": 0.0, "scale": None, "exclude_class": True,
            "reduction": 2, "bias": True, "coefficient_top": 0, "estimate_threshold": None,
        },
        "mhsa_flops": {"rank": None, "active": 1.0},
    },
    "ssa": {
        "SSAAttention": {"kv_heads": None, "head_dim": None, "block_size": 16, "top_k": 16, "select": None, "rope": True},
        "training_loss": {"weight": 10.0},
    },
    "superlinear-attention": {
        "SuperlinearAttention": {
            "kv_heads": None, "top": 2, "skip": 3, "backward": 2.0, "forward": 0.0, "power": 2.0, "span_power": 0.5, "rope": True,
        },
        "anchors_of": {"power": 2.0},
        "window_size": {"power": 2.0},
        "span_of": {"span_power": 0.5, "power": 2.0},
        "span_search": {"power": 2.0},
        "covered": {"forward": 0.0},
    },
    "vmoba": {
        "vmoba": {
            "tile": (1, 8, 8), "layer": 0, "mode": "threshold", "threshold": 0.25, "top_k": 3, "scope": "query_head", "unreached": None,
            "fallback": False,
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("slug", SETTINGS)
def test_settings(slug: str) -> None:
    module = importlib.import_module(f"regard.zoo.sparse.{slug.replace('-', '_')}")
    for name, wanted in SETTINGS[slug].items():
        function = module
        for part in name.split("."):
            function = getattr(function, part)
        parameters = inspect.signature(function).parameters
        assert {key: parameters[key].default for key in wanted} == wanted, name
