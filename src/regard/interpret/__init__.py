"""Reading models through taps: scores and masks of heads, attribution, patching, circuits."""

from typing import Any

from ..lazy import listed, load
from .direct import direct_effects
from .heads import ablated, gated, head_counts, importance, removable
from .maps import AttentionView, attention_view
from .patching import activation_patch, logit_difference, path_patch
from .rotary import turns_of
from .sinks import sink_report
from .surgery import prune
from .tables import HeadTable
from .weights import HeadWeights, head_weights, written

# Rows of the zoo under their public names, each loaded when it is first asked for.
ROWS = {
    "HeadMask": "analysis.headmask",
    "ablation_table": "analysis.head_pruning",
    "best_heads": "analysis.head_pruning",
    "blank_out": "analysis.rollout_and_flow",
    "circuit_overlap": "analysis.circuit_reuse",
    "class_sensitivity": "analysis.normgrad",
    "combine": "analysis.normgrad",
    "detect_sinks": "analysis.secondary_attention_sinks",
    "direct_attribution": "analysis.circuit_reuse",
    "discover": "analysis.attention_pattern_injection",
    "embedding_saliency": "analysis.posir",
    "find_circuit": "analysis.circuit_reuse",
    "flow": "analysis.rollout_and_flow",
    "graph_attention_report": "analysis.graph_attention_windows_in_llms",
    "graph_window": "analysis.graph_attention_windows_in_llms",
    "inject": "analysis.attention_pattern_injection",
    "head_pattern_report": "analysis.chinchilla_mcq_circuit_analysis",
    "input_gradients": "analysis.rollout_and_flow",
    "inequality": "analysis.headmask",
    "position_report": "analysis.posir",
    "prune_schedule": "analysis.head_pruning",
    "rank_correlation": "analysis.rollout_and_flow",
    "meta_saliency": "analysis.normgrad",
    "low_rank_head": "analysis.chinchilla_mcq_circuit_analysis",
    "mlp_alignment": "analysis.secondary_attention_sinks",
    "needle_recall": "analysis.retrieval_head",
    "repair": "analysis.circuit_reuse",
    "omega_svd": "analysis.sparse_attention_decomposition",
    "removed": "analysis.sparse_attention_decomposition",
    "retrieval_scores": "analysis.retrieval_head",
    "rollout": "analysis.rollout_and_flow",
    "saliency": "analysis.normgrad",
    "sink_levels": "analysis.secondary_attention_sinks",
    "sink_score": "analysis.secondary_attention_sinks",
    "score_components": "analysis.sparse_attention_decomposition",
    "sparse_set": "analysis.sparse_attention_decomposition",
    "suppress": "analysis.secondary_attention_sinks",
    "total_effect": "analysis.chinchilla_mcq_circuit_analysis",
    "trace": "analysis.sparse_attention_decomposition",
}

__all__ = [
    "AttentionView",
    "HeadTable",
    "HeadWeights",
    "ablated",
    "activation_patch",
    "attention_view",
    "direct_effects",
    "gated",
    "head_counts",
    "head_weights",
    "importance",
    "logit_difference",
    "path_patch",
    "prune",
    "removable",
    "sink_report",
    "turns_of",
    "written",
    *ROWS,
]


def __getattr__(name: str) -> Any:
    return load(__name__, ROWS, name)


def __dir__() -> list[str]:
    return listed(globals(), ROWS)
