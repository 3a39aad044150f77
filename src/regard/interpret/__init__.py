"""Reading models through taps: scores and masks of heads, attribution, patching, circuits."""

from typing import Any

from ..lazy import listed, load
from .heads import ablated, gated, head_counts, importance, removable
from .surgery import prune
from .tables import HeadTable

# Rows of the zoo under their public names, each loaded when it is first asked for.
ROWS = {
    "HeadMask": "analysis.headmask",
    "ablation_table": "analysis.head_pruning",
    "best_heads": "analysis.head_pruning",
    "blank_out": "analysis.rollout_and_flow",
    "class_sensitivity": "analysis.normgrad",
    "combine": "analysis.normgrad",
    "detect_sinks": "analysis.secondary_attention_sinks",
    "flow": "analysis.rollout_and_flow",
    "input_gradients": "analysis.rollout_and_flow",
    "inequality": "analysis.headmask",
    "prune_schedule": "analysis.head_pruning",
    "rank_correlation": "analysis.rollout_and_flow",
    "meta_saliency": "analysis.normgrad",
    "mlp_alignment": "analysis.secondary_attention_sinks",
    "needle_recall": "analysis.retrieval_head",
    "retrieval_scores": "analysis.retrieval_head",
    "rollout": "analysis.rollout_and_flow",
    "saliency": "analysis.normgrad",
    "sink_levels": "analysis.secondary_attention_sinks",
    "sink_score": "analysis.secondary_attention_sinks",
    "suppress": "analysis.secondary_attention_sinks",
}

__all__ = ["HeadTable", "ablated", "gated", "head_counts", "importance", "prune", "removable", *ROWS]


def __getattr__(name: str) -> Any:
    return load(__name__, ROWS, name)


def __dir__() -> list[str]:
    return listed(globals(), ROWS)
