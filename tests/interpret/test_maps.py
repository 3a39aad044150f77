"""The page of maps holds the model's weights, whatever the tokens are, and refuses what it cannot show."""

import base64
import json
import math

import pytest
import torch

from regard import RegardError, models, taps
from regard.interpret import AttentionView, attention_view, maps


def data_of(page):
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


@torch.no_grad()
def test_the_page_holds_the_weights_of_the_heads_that_were_asked_for(tmp_path):
    model = models.load("tiny")
    ids = models.encode("a < b\n</script> c")
    words = [models.decode(t.reshape(1)) for t in ids[0]]
    view = attention_view(model, ids, words, layers=[1, 3], heads=[5, 2])
    with taps(model, "weights") as seen:
        model(ids)
    data = data_of(view.save(tmp_path / "in" / "a.html").read_text("utf-8"))
    assert data["tokens"] == words and data["layers"] == [1, 3]
    for layer, found in zip((1, 3), data["maps"], strict=True):
        assert [one["head"] for one in found] == [5, 2]
        for one in found:
            own = torch.tensor(list(base64.b64decode(one["map"]))).double().div(255).square().view(len(words), len(words))
            torch.testing.assert_close(own, seen["weights", layer][0, one["head"]].double(), rtol=0, atol=4e-3)
    assert "iframe srcdoc" in view._repr_html_() and "<script" not in view._repr_html_()
    assert view.plot(3, 2) == AttentionView(tuple(words), {3: seen["weights", 3][0]}).plot(3, 2)
    page = attention_view(model, ids, words).page()
    assert "http" not in page.replace("http-equiv", "") and [len(found) for found in data_of(page)["maps"]] == [8] * 4
    with pytest.raises(RegardError, match="layer=0"):
        view.plot(0, 2)
    with pytest.raises(RegardError, match="head=0"):
        view.plot(3, 0)


def test_what_cannot_be_shown_is_refused(monkeypatch):
    model, ids = models.load("tiny"), models.encode("abc")
    for wrong in (ids.expand(2, -1), ids[0]):
        with pytest.raises(RegardError, match="ids has shape"):
            attention_view(model, wrong, ["a"] * ids.shape[1])
    with pytest.raises(RegardError, match="there are 1 tokens"):
        attention_view(model, ids, ["a"])
    with pytest.raises(RegardError, match="layers"):
        attention_view(model, ids, ["a"] * ids.shape[1], layers=[9])
    even = torch.full((2, 3, 3), 1 / 3)
    for weights, message in (
        ({0: even[0]}, "shape"),
        ({0: even[:, :2]}, "as there are tokens"),
        ({0: even, 1: -even}, "layer 1 are not between"),
        ({0: even * 4}, "not between"),
        ({0: even * math.nan}, "not between"),
        ({}, "no weights"),
    ):
        with pytest.raises(RegardError, match=message):
            AttentionView(("a", "b", "c"), weights)
    with pytest.raises(RegardError, match="a number for each map"):
        AttentionView(("a", "b", "c"), {0: even}, (1,))
    monkeypatch.setattr(maps, "MOST", 17)
    with pytest.raises(RegardError, match="18 weights"):
        AttentionView(("a", "b", "c"), {0: even})
    with pytest.raises(RegardError, match=r"32 heads on 4 tokens.*at most 1 heads"):
        attention_view(model, ids, ["a"] * 4)
    assert attention_view(model, ids, ["a"] * 4, layers=[0], heads=[1]).weights[0].shape == (1, 4, 4)
