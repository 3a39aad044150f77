"""Every result prints as a table, plots itself as SVG and PNG, and becomes a data frame."""

import math

import pytest
import torch
from rich.console import Console

from regard import MissingDependency, RegardError, plots
from regard.interpret.direct import Direct
from regard.interpret.sinks import SinkReport
from regard.interpret.tables import HeadTable
from regard.interpret.views import HeadViews
from regard.zoo.analysis.abrupt_icl import Emergence
from regard.zoo.analysis.active_dormant_heads import Flow
from regard.zoo.analysis.attention_svm import Margin, Run
from regard.zoo.analysis.benefits_of_rank import RankTable
from regard.zoo.analysis.chinchilla_mcq_circuit_analysis import TotalEffects
from regard.zoo.analysis.circuit_reuse import Circuit, Overlap
from regard.zoo.analysis.deceptive_attention import Deception
from regard.zoo.analysis.filter_and_store import Acquired
from regard.zoo.analysis.fixed_head_size import Bottleneck
from regard.zoo.analysis.graph_attention_windows_in_llms import GraphReport
from regard.zoo.analysis.head_pruning import Round, Schedule
from regard.zoo.analysis.headmask import Inequality
from regard.zoo.analysis.icl_linear_regression import Pattern
from regard.zoo.analysis.icl_softmax_regression import Closeness
from regard.zoo.analysis.mha_memorization_capacity import Memorised
from regard.zoo.analysis.posir import Curve as PositionCurve
from regard.zoo.analysis.posir import PositionReport
from regard.zoo.analysis.random_feature_attention import Curve
from regard.zoo.analysis.rank_one_universal import Fitted
from regard.zoo.analysis.retrieval_head import RetrievalHeads
from regard.zoo.analysis.scan_snap import ScanRun, scan_data
from regard.zoo.analysis.secondary_attention_sinks import Alignment
from regard.zoo.analysis.sparse_attention_decomposition import Edge, Trace
from regard.zoo.analysis.superiority_of_softmax import Margins

TABLE = HeadTable(torch.tensor([[0.5, 0.25, 0.1], [0.75, 0.0, math.nan]]), "weight")
BINS = PositionCurve(torch.tensor([0.1, 0.6]), torch.tensor([0.5, 0.25]), torch.tensor([3, 4]))
NONE = PositionCurve(torch.tensor([0.1]), torch.tensor([0.0]), torch.tensor([2]))
EDGES = (Edge((0, 1), 2, (1, 0), 4, 2, "src", 0.5, (0, 3)), Edge("embedding", 1, (1, 0), 4, 2, "dst", -0.25, (1,)))
SCANNED = ScanRun(scan_data(), [0, 2], [torch.zeros(2, scan_data().vocab), torch.ones(2, scan_data().vocab)], [1.0, 0.5])
# (result, columns, rows)
RESULTS = [
    (TABLE, ["layer", "head", "weight"], 5),
    (HeadViews(*[TABLE] * 2, torch.zeros(2, 3), *[TABLE] * 3), ["layer", "head", "sink", "second", "previous", "entropy", "distance"], 5),
    (Direct(torch.zeros(2), torch.rand(2, 2, 3), torch.rand(2, 2), torch.zeros(2)), ["layer", "head", "direct effect"], 6),
    (Emergence(torch.nn.Linear(1, 1), [0, 4], {"novel": [0.1, 0.9], "test": [0.2, 0.3]}), ["steps", "measures novel", "measures test"], 2),  # type: ignore[arg-type]
    (SinkReport(*[TABLE] * 5, None, None), ["layer", "head", "dormant", "active", "previous", "total", "value"], 5),
    (Flow((1.0, 10.0, 100.0), (0.1, 0.2, 0.3), (1.0, 0.5, 0.2)), ["times", "sink", "value"], 3),
    (Margin(torch.eye(2), torch.tensor([1.0, 1.2]), 3.0, True), ["margins"], 2),
    (Run(torch.eye(2), [0.1, 0.5, 0.9], torch.tensor([1, 0]), torch.tensor([True, True]), 0.5), ["step", "correlation"], 3),
    (RankTable({(1, 16, 2, 8): 0.5, (1, 64, 2, 8): 0.25}), ["rank", "heads", "points", "dim", "error"], 2),
    (TotalEffects(TABLE, torch.rand(2)), ["layer", "head", "heads"], 5),
    (Circuit({"logits": [(0, 1), (1, 0)]}, {"logits": TABLE}), ["role", "layer", "head", "effect"], 2),
    (Overlap(0.5, 0.75, 1.0), ["union", "first", "second"], 1),
    (Deception(0.9, 0.1, 0.5, 1.5), ["accuracy", "mass", "blocked", "norms"], 1),
    (
        Acquired(None, None, [2.0] * 9, [1.0] * 5, 0.5, 1.0, 0.0, [0, 5], [0.1, 0], [0.2, 0.6], [0.3, 0.4]),
        ["steps", "filler", "subject", "relation"],
        2,
    ),  # type: ignore[arg-type]
    (Bottleneck(torch.eye(3), torch.eye(3), 0.25, False), ["error", "exact"], 1),
    (
        GraphReport(*[torch.rand(2, 3)] * 4, torch.rand(2, 3, 4)),
        ["layer", "head", "text_to_node", "node_to_node", "sink", "correlation"],
        6,
    ),
    (Schedule(8, [Round((), 1.0), Round(((0, 1), (1, 1)), 0.5)]), ["heads removed", "share", "value"], 2),
    (Inequality(0.5, 0.25, None), ["spread", "gini"], 1),
    (Pattern(torch.rand(4), torch.rand(4), 0.1, 0.2, 0.3, 0.4), ["omega", "mu"], 4),
    (Closeness(*[0.5] * 8), list(Closeness.__dataclass_fields__), 1),
    (Memorised(3, 5, (2.0, 1.0, 0.5), torch.rand(2)), ["step", "loss"], 3),
    (BINS, ["centre", "mean", "count"], 2),
    (PositionReport(0.4, BINS, {"Q1": BINS, "Q2": NONE}), ["documents", "queries", "nDCG", "psi"], 3),
    (Curve((10, 20, 40), (0.5, 0.25, 0.125)), ["sizes", "errors"], 3),
    (Fitted(1.0, None, (1.0, 0.5)), ["loss"], 2),
    (RetrievalHeads(TABLE, TABLE, (1.0, 0.0), 0.5), ["layer", "head", "scores", "active"], 5),
    (SCANNED, ["steps", "loss"], 2),
    (Alignment(torch.rand(1, 2, 3), torch.rand(1, 2, 3)), ["row", "layer", "token", "cosine", "norm"], 6),
    (Trace(EDGES), ["sender", "token", "receiver", "dst", "src", "side", "weight"], 2),
    (Margins((8, 16), {"softmax": (0.5, 0.4)}, {"softmax": (1.0, 0.9)}), ["lengths", "margin softmax", "accuracy softmax"], 2),
]


@pytest.mark.parametrize(("found", "columns", "rows"), RESULTS, ids=lambda x: type(x).__name__ if hasattr(x, "columns") else "")
def test_results_print_plot_and_become_data_frames(found, columns, rows, tmp_path):
    pytest.importorskip("resvg_py")
    frame = found.to_pandas()
    assert list(frame.columns) == columns and len(frame) == rows
    with (console := Console(width=200, record=True, quiet=False, file=(tmp_path / "table").open("w"))):
        console.print(found)
    assert len(console.export_text().splitlines()) > 4
    svg = found.plot()
    assert svg.startswith("<svg") and svg.endswith("</svg>") and svg._repr_svg_() == svg
    assert svg.save(tmp_path / "a.svg").read_text() == svg
    assert svg.save(tmp_path / "in" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_outside_the_table_stand_below_it():
    table = Margin(torch.eye(2), torch.tensor([1.0, 1.2]), 3.0, True).__rich__()
    assert table.caption == "objective 3, feasible True" and table.row_count == 2
    assert not Overlap(0.5, 0.75, 1.0).__rich__().caption


def test_values_are_where_they_belong():
    frame = SinkReport(TABLE, TABLE, TABLE, TABLE, TABLE, None, None).to_pandas()
    assert frame.iloc[3][["layer", "head", "value"]].tolist() == [1, 0, 0.75]
    psi = PositionReport(0.4, BINS, {"Q2": NONE}).columns()["psi"]
    assert psi[0] == 0.5 and math.isnan(psi[1])
    assert Circuit({"logits": [(1, 0)]}, {"logits": TABLE}).columns() == {"role": ["logits"], "layer": [1], "head": [0], "effect": [0.75]}
    rows = Alignment(torch.arange(6.0).view(1, 2, 3), torch.zeros(1, 2, 3)).to_pandas()
    assert rows[(rows.layer == 1) & (rows.token == 2)].cosine.tolist() == [5.0]
    assert "gap" in SinkReport(*[TABLE] * 6, None).columns()


def test_plots_refuse_what_they_cannot_do(tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    for name in ("a.pdf", "a"):
        with pytest.raises(RegardError, match=r"ends in \.svg or \.png"):
            TABLE.plot().save(tmp_path / name)
    with pytest.raises(RegardError, match="scale=0"):
        TABLE.plot().save(tmp_path / "a.png", scale=0)
    with pytest.raises(RegardError, match="no numbers to plot"):
        Inequality.plot(type("Empty", (Inequality,), {"columns": lambda self: {}})(0.0, 0.0, None))
    with pytest.raises(RegardError, match="role='q'"):
        Circuit({}, {"logits": TABLE}).plot("q")
    with pytest.raises(RegardError, match="name='rest'"):
        SinkReport(*[TABLE] * 6, None).plot("rest")
    assert SinkReport(*[TABLE] * 6, None).plot("gap") == TABLE.plot()
    plots.sans.cache_clear()
    monkeypatch.setattr(plots, "SANS", ("No Such Font",))
    with pytest.raises(MissingDependency, match="font"):
        TABLE.plot().save(tmp_path / "a.png")
    plots.sans.cache_clear()


def test_bars_stand_on_zero_and_leave_out_what_is_no_number():
    svg = plots.bars("Some", {"a": 1.0, "b": -1.0, "c": math.nan})
    assert svg.count("<rect") == 2 and "nan" in svg
    left, right = (part.split('"')[0] for part in (svg.split('<rect x="')[2], svg.split('<rect x="')[1]))
    assert float(left) < float(right) == 340.0
