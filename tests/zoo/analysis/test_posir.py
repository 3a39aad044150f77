"""PosIR beyond its checks: what the generator makes, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from regard import RegardError
from regard.interpret.embedding import resampled, token_saliency
from regard.lab.naive import gap
from regard.nn import Decoder
from regard.nn.embedder import Embedder
from regard.tasks.evidence import evidence, ndcg
from regard.zoo.analysis.posir import Curve, curve, embedding_saliency, position_report, report_of


def test_documents_hold_their_evidence_where_they_say():
    turned = torch.arange(41).flip(0)
    for translation in (None, turned):
        data = evidence(
            [8, 20, 31], torch.Generator().manual_seed(0), places=[0, 1, 0.5], span=6, fillers=10, words=30, translation=translation
        )
        assert data.start.tolist() == [0, 14, 12] and (data.stop - data.start).tolist() == [6] * 3
        assert data.keep.sum(1).tolist() == [8, 20, 31] and not data.documents[~data.keep].any()
        assert data.place.tolist() == [3 / 8, 17 / 20, 15 / 31]
        for n in range(3):
            said = data.documents[n, data.start[n] : data.stop[n]]
            rest = torch.cat((data.documents[n, : data.start[n]], data.documents[n, data.stop[n] : data.lengths[n]]))
            assert bool((said > 10).all()) and bool(((rest > 0) & (rest <= 10)).all()) and len(set(said.tolist())) == 6
            asked = data.queries[n] if translation is None else turned[data.queries[n]]
            assert set(asked.tolist()) == set(said.tolist()) and not torch.equal(asked, said)


def test_reports_print_and_plot_and_gradients_are_left_alone():
    data = evidence([30] * 6, torch.Generator().manual_seed(0), fillers=10, words=30)
    model = Embedder(Decoder(vocab=41, dim=16, layers=1, heads=2))
    report = position_report(model, data, batch=4)
    assert gap(torch.tensor(report.score), torch.tensor(position_report(model, data, batch=1).score)) < 1e-6
    assert report.plot().startswith("<svg") and report.__rich__().row_count == 2 and report.buckets.keys() == {"Q1"}
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert embedding_saliency(model, data, between=(0, 1), least=1, points=7).shape == (7,)


def test_what_cannot_be_measured_is_refused():
    one = torch.ones(3)
    with pytest.raises(RegardError, match="no value"):
        _ = curve(one / 2, 0 * one).psi
    with pytest.raises(RegardError, match="two or more"):
        curve(one / 2, one).trend()
    for place in (one + 0.1, -one, torch.full((3,), torch.nan), one[:0]):
        with pytest.raises(RegardError, match="expected"):
            curve(place, one[: len(place)])
    with pytest.raises(RegardError, match="relevant document"):
        ndcg(torch.randn(2, 3), torch.zeros(2, 3))
    with pytest.raises(RegardError, match="finite"):
        ndcg(torch.full((1, 2), torch.nan), torch.ones(1, 2))
    with pytest.raises(RegardError, match="rising"):
        report_of(one, one, one, edges=(0, 5, 5))
    with pytest.raises(RegardError, match="below every length"):
        report_of(one, one, one, edges=(2, 5))
    with pytest.raises(RegardError, match="lengths"):
        evidence([3], torch.Generator(), span=8)
    with pytest.raises(RegardError, match="translation"):
        evidence([9], torch.Generator(), translation=torch.arange(4))
    with pytest.raises(RegardError, match="places"):
        evidence([9, 9], torch.Generator(), places=[0.5])
    with pytest.raises(RegardError, match="pool="):
        Embedder(Decoder(), "max")
    with pytest.raises(RegardError, match="model Linear"):
        Embedder(torch.nn.Linear(2, 2))
    data = evidence([30], torch.Generator(), fillers=10, words=30)
    with pytest.raises(RegardError, match="least=1024"):
        embedding_saliency(Embedder(Decoder(vocab=41)), data)


def test_bins_buckets_and_scores_by_hand():
    place, score = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.5, 1.0]), torch.tensor([1.0, 0.5, 0.25, 0.5, 0.0, 1.0])
    found = curve(place, score, 4)  # (0, 1/4], (1/4, 1/2], .. and the first with 0
    assert found.centre.tolist() == [0.125, 0.375, 0.875] and found.count.tolist() == [3, 2, 1]
    assert (
        found.mean.tolist() == pytest.approx([1.75 / 3, 0.25, 1.0])
        and found.psi == pytest.approx(0.75)
        and found.score == pytest.approx((1.75 / 3 + 1.25) / 3)
    )
    assert len(curve(torch.linspace(0, 1, 1000), torch.ones(1000)).mean) == 20
    report = report_of(score, place, torch.tensor([1, 5, 6, 10, 11, 99]), 4, (0, 5, 10))
    assert {name: c.count.sum().item() for name, c in report.buckets.items()} == {"Q1": 2, "Q2": 2, "Q3": 2}
    assert report.buckets["Q2"].mean.tolist() == [0.25, 0.5] and report.score == pytest.approx(3.25 / 6) and report.psi == found.psi
    assert report_of(score, place, torch.tensor([1, 512, 513, 1025, 1536, 1537])).buckets.keys() == {"Q1", "Q2", "Q3", "Q4"}
    assert {name: len(own) for name, own in report.columns().items()} == {"documents": 4, "queries": 4, "nDCG": 4, "psi": 4}


def test_trends_are_scipy_s():
    stats = pytest.importorskip("scipy.stats")
    found = Curve(torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0.9, 0.3, 0.4, 0.1]), torch.ones(4))
    x, y, own = found.centre.tolist(), found.mean.tolist(), found.trend()
    line = stats.linregress(x, y)
    assert (own["slope"], own["intercept"], own["r_squared"]) == pytest.approx((line.slope, line.intercept, line.rvalue**2))
    assert (own["pearson"], own["spearman"], own["kendall"]) == pytest.approx(
        (stats.pearsonr(x, y).statistic, stats.spearmanr(x, y).statistic, stats.kendalltau(x, y).statistic)
    )
    flat = Curve(torch.tensor([0.1, 0.4]), torch.tensor([0.5, 0.5]), torch.ones(2)).trend()
    assert flat == {"slope": 0.0, "intercept": 0.5, "r_squared": 0.0, "pearson": 0.0, "spearman": 0.0, "kendall": 0.0}


def test_documents_are_ranked_by_cosine_and_curves_are_means():
    data = evidence([30, 20, 25, 30, 28], torch.Generator().manual_seed(0), fillers=10, words=30)
    torch.manual_seed(0)
    table, seen = torch.randn(41, 6), []

    def encode(ids, keep):
        seen.append(len(ids))
        return (table[ids] * keep[..., None]).sum(1)

    found = position_report(encode, data, k=2, bins=3, edges=(0, 24), batch=2)
    assert seen == [2, 2, 1] * 2
    q, d = table[data.queries].sum(1), (table[data.documents] * data.keep[..., None]).sum(1)
    near = (q @ d.T) / (q.norm(dim=1)[:, None] * d.norm(dim=1))
    gains = []
    for n in range(5):
        rank = int((near[n] > near[n, n]).sum())
        gains.append(1 / math.log2(rank + 2) if rank < 2 else 0.0)
    assert found.score == pytest.approx(sum(gains) / 5) and found.buckets.keys() == {"Q1", "Q2"}
    truth = curve(data.place, torch.tensor(gains), 3)
    assert found.overall.mean.tolist() == pytest.approx(truth.mean.tolist())
    model = Embedder(Decoder(vocab=41, dim=16, layers=1, heads=2))
    data = evidence([30, 20, 30, 30], torch.Generator().manual_seed(0), places=[0.5, 0.5, 0.9, 0.45], fillers=10, words=30)
    own = embedding_saliency(model, data, least=25, points=7, percentile=50.0, drop=(1, 2))
    kept = [resampled(token_saliency(model, data.queries[n], data.documents[n, :30], (1, 2)), 7, 50.0) for n in range(4) if n in (0, 3)]
    assert torch.allclose(own, torch.stack(kept).mean(0))
    wide = embedding_saliency(model, data, between=(0, 1), least=20)
    kept = [resampled(token_saliency(model, data.queries[n], data.documents[n, : data.lengths[n]], (0, 1)), 100, 99.0) for n in range(4)]
    assert torch.allclose(wide, torch.stack(kept).mean(0))
