"""What experiments draw and put into tables: the very numbers, places and axes."""

import math

import pytest
import torch

from regard.interpret.tables import HeadTable
from regard.zoo.analysis import (
    abrupt_icl,
    active_dormant_heads,
    attention_svm,
    benefits_of_rank,
    circuit_reuse,
    filter_and_store,
    graph_attention_windows_in_llms,
    head_pruning,
    mha_memorization_capacity,
    posir,
    random_feature_attention,
    scan_snap,
    secondary_attention_sinks,
    sparse_attention_decomposition,
    superiority_of_softmax,
)

NAN = math.nan
PLAIN: dict[str, bool] = {}
SCANNED = scan_snap.scan_data(1, 2, common=2, more_common=2, distinct=2)
Z = [torch.arange(8.0)[None], 10 + torch.arange(8.0)[None]]
CURVE = posir.Curve(torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.25]), torch.tensor([3, 4]))
NOTHING = posir.Curve(torch.tensor([0.25]), torch.tensor([0.0]), torch.tensor([2]))
EDGES = [sparse_attention_decomposition.Edge((0, n), n, (1, 0), 30, 2, "src", (-1) ** n * (n + 1.0), (0,)) for n in range(26)]

# module, result, what its plot is made of: lines, rows or bars, and the axes that are logarithmic
FIGURES = {
    "abrupt-icl": (
        abrupt_icl,
        abrupt_icl.Emergence(torch.nn.Linear(1, 1), [0, 4], {"a": [0.25, 0.75], "b": [0.5, 1.0]}),
        {"a": [(0.0, 0.25), (4.0, 0.75)], "b": [(0.0, 0.5), (4.0, 1.0)]},
        PLAIN,
    ),
    "active-dormant-heads": (
        active_dormant_heads,
        active_dormant_heads.Flow((1.0, 100.0), (0.5, 2.0), (1.0, 0.25)),
        {"sink logit": [(0.0, 0.5), (2.0, 2.0)], "value": [(0.0, 1.0), (2.0, 0.25)]},
        PLAIN,
    ),
    "attention-svm": (
        attention_svm,
        attention_svm.Run(torch.eye(2), [0.5, 0.75]),
        {"cosine": [(0.0, 0.5), (1.0, 0.75)]},
        PLAIN,
    ),
    "benefits-of-rank": (
        benefits_of_rank,
        benefits_of_rank.RankTable({(1, 16, 2, 8): 0.5, (2, 16, 2, 8): 0.3, (1, 64, 2, 8): 0.25}),
        {"rank 1, 2 points, 8 dimensions": [(16.0, 0.5), (64.0, 0.25)], "rank 2, 2 points, 8 dimensions": [(16.0, 0.3)]},
        {"log_x": True},
    ),
    "filter-and-store": (
        filter_and_store,
        filter_and_store.Acquired(None, None, [], [], 0.0, 0.0, 0.0, [0, 5], [0.1, 0.2], [0.3, 0.4], [0.5, 0.6]),
        {"filler": [(0.0, 0.1), (5.0, 0.2)], "subject": [(0.0, 0.3), (5.0, 0.4)], "relation": [(0.0, 0.5), (5.0, 0.6)]},
        PLAIN,
    ),
    "graph-attention-windows-in-llms": (
        graph_attention_windows_in_llms,
        graph_attention_windows_in_llms.GraphReport(
            *[torch.zeros(2, 2)] * 4, torch.tensor([[[1.0, 3, NAN], [2.0, 5, NAN]], [[0.0, 1, 2], [4, 1, 6]]])
        ),
        {"layer 0": [(0.0, 1.5), (1.0, 4.0)], "layer 1": [(0.0, 2.0), (1.0, 1.0), (2.0, 4.0)]},
        PLAIN,
    ),
    "head-pruning": (
        head_pruning,
        head_pruning.Schedule(8, [head_pruning.Round((), 1.0), head_pruning.Round(((0, 1), (1, 1)), 0.5)]),
        {"value": [(0.0, 1.0), (25.0, 0.5)]},
        PLAIN,
    ),
    "posir": (
        posir,
        posir.PositionReport(0.4, CURVE, {"Q2": NOTHING}),
        {"all": [(0.25, 0.5), (0.75, 0.25)], "Q2": [(0.25, 0.0)]},
        PLAIN,
    ),
    "random-feature-attention": (
        random_feature_attention,
        random_feature_attention.Curve((10, 20), (0.5, 0.25)),
        {"test": [(10.0, 0.5), (20.0, 0.25)]},
        {"log_x": True, "log_y": True},
    ),
    "scan-snap": (
        scan_snap,
        scan_snap.ScanRun(SCANNED, [0, 5], Z, [1.0, 0.5]),
        {f"{kind} {t}": [(0.0, float(t)), (5.0, 10.0 + t)] for kind, ts in (("common", (0, 1, 2)), ("distinct", (4, 5))) for t in ts},
        PLAIN,
    ),
    "secondary-attention-sinks": (
        secondary_attention_sinks,
        secondary_attention_sinks.Alignment(torch.arange(12.0).view(2, 2, 3), torch.zeros(2, 2, 3)),
        [[0.0, 1, 2], [3, 4, 5]],
        PLAIN,
    ),
    "sparse-attention-decomposition": (
        sparse_attention_decomposition,
        sparse_attention_decomposition.Trace(tuple(EDGES)),
        {f"(0, {n}) at {n} → (1, 0), src": (-1) ** n * (n + 1.0) for n in range(25, 1, -1)},
        PLAIN,
    ),
    "superiority-of-softmax": (
        superiority_of_softmax,
        superiority_of_softmax.Margins((8, 16), {"softmax": (0.5, 0.4), "linear": (0.1, 0.05)}, {}),
        {"softmax": [(8.0, 0.5), (16.0, 0.4)], "linear": [(8.0, 0.1), (16.0, 0.05)]},
        {"log_x": True, "log_y": True},
    ),
}


def rounded(x):
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    return type(x)(map(rounded, x)) if isinstance(x, (list, tuple)) else round(float(x), 6)


@pytest.mark.parametrize("slug", FIGURES)
def test_plots_draw_their_numbers(slug, monkeypatch):
    module, found, drawn, axes = FIGURES[slug]
    seen = []
    for name in ("figure", "heatmap", "bars"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, lambda *args, **options: seen.append((args[-1], options)) or "made")
    assert found.plot() == "made" and len(seen) == 1
    assert rounded(seen[0][0]) == rounded(drawn) and list(seen[0][0]) == list(drawn) and seen[0][1] == axes


COLUMNS = {
    "attention-svm": (FIGURES["attention-svm"][1], {"step": [0, 1], "correlation": [0.5, 0.75]}),
    "benefits-of-rank": (
        FIGURES["benefits-of-rank"][1],
        {"rank": [1, 2, 1], "heads": [16, 16, 64], "points": [2] * 3, "dim": [8] * 3, "error": [0.5, 0.3, 0.25]},
    ),
    "circuit-reuse": (
        circuit_reuse.Circuit({"a": [(0, 1), (1, 0)], "b": [(1, 1)]}, {n: HeadTable(torch.tensor([[1.0, 2], [3, 4]])) for n in "ab"}),
        {"role": ["a", "a", "b"], "layer": [0, 1, 1], "head": [1, 0, 1], "effect": [2.0, 3.0, 4.0]},
    ),
    "graph-attention-windows-in-llms": (
        graph_attention_windows_in_llms.GraphReport(*[torch.tensor([[n, 10.0 + n]]) for n in range(4)], torch.zeros(1, 2, 3)),
        {"layer": [0, 0], "head": [0, 1], "text_to_node": [0, 10], "node_to_node": [1, 11], "sink": [2, 12], "correlation": [3, 13]},
    ),
    "head-pruning": (FIGURES["head-pruning"][1], {"heads removed": [0, 2], "share": [0.0, 0.25], "value": [1.0, 0.5]}),
    "mha-memorization-capacity": (
        mha_memorization_capacity.Memorised(3, 5, (2.0, 1.0), torch.zeros(2)),
        {"step": [0, 1], "loss": [2.0, 1.0]},
    ),
    "secondary-attention-sinks": (
        secondary_attention_sinks.Alignment(torch.arange(4.0).view(1, 2, 2), 10 + torch.arange(4.0).view(1, 2, 2)),
        {"row": [0] * 4, "layer": [0, 0, 1, 1], "token": [0, 1, 0, 1], "cosine": [0, 1, 2, 3], "norm": [10, 11, 12, 13]},
    ),
    "sparse-attention-decomposition": (
        sparse_attention_decomposition.Trace(tuple(EDGES[:1])),
        {"sender": [(0, 0)], "token": [0], "receiver": [(1, 0)], "dst": [30], "src": [2], "side": ["src"], "weight": [1.0]},
    ),
}


@pytest.mark.parametrize("slug", COLUMNS)
def test_tables_hold_their_numbers(slug):
    found, columns = COLUMNS[slug]
    assert {name: list(x) for name, x in found.columns().items()} == columns


def test_posir_counts_queries_and_leaves_a_psi_that_is_none():
    found = FIGURES["posir"][1].columns()
    psi = found.pop("psi")
    assert found == {"documents": ["all", "Q2"], "queries": [7, 2], "nDCG": [0.4, 0.0]} and psi[0] == 0.5 and math.isnan(psi[1])


def test_other_rows_of_secondary_attention_sinks():
    found = FIGURES["secondary-attention-sinks"][1]
    assert found.plot(1) != found.plot(0) == found.plot()
