"""Findings as experiments: functions with parameters that return what they measured."""

from typing import Any

from ...lazy import listed, load

# Rows of the zoo under their public names, each loaded when it is first asked for.
ROWS = {
    "cab": "analysis.cab",
    "acquire": "analysis.filter_and_store",
    "train_backcopy": "analysis.active_dormant_heads",
    "recall_accuracy": "analysis.dsf",
    "rank_benefit": "analysis.benefits_of_rank",
    "low_rank_bottleneck": "analysis.fixed_head_size",
    "closeness_experiment": "analysis.icl_softmax_regression",
    "descend": "analysis.attention_svm",
    "emergence": "analysis.abrupt_icl",
    "fit_sequences": "analysis.rank_one_universal",
    "scan_and_snap": "analysis.scan_snap",
    "train_regression": "analysis.icl_linear_regression",
    "deception_report": "analysis.deceptive_attention",
    "memorise": "analysis.mha_memorization_capacity",
    "sample_complexity_curve": "analysis.random_feature_attention",
    "softmax_vs_linear": "analysis.superiority_of_softmax",
    "taxonomy": "linear.efficient_attention_survey",
    "mixing_ranks": "linear.mamba_rank_analysis",
    "policy_run": "linear.minimax_m1",
    "sink_experiment": "softmax.attention_sink",
    "structural_attention": "softmax.bayesian_attention_view",
    "recruit": "softmax.localist_recruitment",
    "attention_limits": "softmax.normalization_limits",
    "attention_flow": "softmax.sinkformer",
}

__all__ = [*ROWS]


def __getattr__(name: str) -> Any:
    return load(__name__, ROWS, name)


def __dir__() -> list[str]:
    return listed(globals(), ROWS)
