"""PosIR beyond its checks: what the generator makes, and what is refused."""

from __future__ import annotations

import pytest
import torch

from regard import RegardError
from regard.lab.naive import gap
from regard.nn import Decoder
from regard.nn.embedder import Embedder
from regard.tasks.evidence import evidence, ndcg
from regard.zoo.analysis.posir import curve, embedding_saliency, position_report, report_of


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
