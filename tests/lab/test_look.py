"""`regard look`: its numbers by plain maps, its page, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from regard import RegardError, models
from regard.cli import app
from regard.interpret.views import head_views, induction
from regard.lab.look import look, needles, page, second_sinks
from regard.lab.sweep.reader import Bytes, model_and_reader

TEXT = b"def total(numbers):\n    result = 0\n    for number in numbers:\n        result += number\n    return result\n" * 2


def test_views_are_those_of_plain_maps():
    ids = models.encode(TEXT)[:, :90]
    found = head_views(models.load("tiny"), ids)
    maps = torch.stack(models.load("tiny", attn_implementation="eager")(ids, output_attentions=True).attentions)[:, 0].double()
    n = ids.shape[1]
    at = torch.arange(n)
    truth = {
        "sink": maps[..., 1:, 0].mean(-1),
        "previous": maps[..., at[1:], at[:-1]].mean(-1),
        "entropy": -torch.special.xlogy(maps, maps).sum(-1)[..., 1:].mean(-1),
        "distance": (maps * (at[:, None] - at).abs()).sum(-1)[..., 1:].mean(-1),
    }
    for name, own in truth.items():
        assert torch.allclose(getattr(found, name).scores, own, atol=1e-4), name
    columns = torch.stack([maps[..., t:, t].mean(-1) for t in range(1, n - 16)], -1)
    assert torch.allclose(found.second.scores, columns.amax(-1), atol=1e-5)
    assert torch.equal(found.places, columns.argmax(-1) + 1.0)


def test_induction_is_the_weight_on_what_came_next():
    ids = torch.randint(97, 123, (30,), generator=torch.Generator().manual_seed(0)).unique()
    found = induction(models.load("tiny"), ids, 12, 3, begin=0, seed=4)
    half = ids[torch.randint(len(ids), (3, 12), generator=torch.Generator().manual_seed(4))]
    text = torch.cat((torch.zeros(3, 1).long(), half, half), 1)
    maps = models.load("tiny", attn_implementation="eager")(text, output_attentions=True).attentions
    for layer, p in enumerate(maps):
        own = torch.stack([p[:, :, 13 + t, 2 + t] for t in range(12)]).mean((0, 1))
        assert torch.allclose(found.scores[layer].float(), own, atol=1e-5)


def test_needles_ask_for_digits_of_the_text():
    haystack = list(TEXT[:100])
    for at, one in enumerate(needles(Bytes(), haystack, 3)):
        digits = bytes(one.needle)
        assert digits.isdigit() and len(digits) == 5 and one.ids[0] == 0
        text = bytes(one.ids[1:].tolist())
        assert text.count(digits) == 1 and text.rstrip().endswith(b"is") and text.count(b"The key of") == 2
        assert abs(one.start - (at + 1) / 4 * 101) < 30


def test_the_page_is_whole_and_needs_no_network(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT)
    out = CliRunner().invoke(
        app, ["look", "tiny", "--text", str(file), "--tokens", "128", "--questions", "1", "--out", str(tmp_path / "a" / "look.html")]
    )
    assert out.exit_code == 0, out.output
    html = (tmp_path / "a" / "look.html").read_text()
    assert html.count("<svg") in (6, 7) and "http://www.w3.org" in html and "src=" not in html and "Induction" in out.output
    assert html.count("http") == html.count("http://www.w3.org/2000/svg")


def test_a_model_that_answers_nothing_is_said_to():
    found = look(str(models.path("tiny")), bytes(range(33, 127)) * 3, 100, 1)
    told = page(found)
    assert ("were not found" in told) == (found.retrieval is None) and len(found.tables) == 6 + (found.retrieval is not None)
    assert all(count >= 1 and most >= 0.1 for _, _, count, most in second_sinks(found.views, found.text))


def test_what_cannot_be_looked_at_is_refused(tmp_path):
    with pytest.raises(RegardError, match="expected 64 or more"):
        look("tiny", TEXT, 63)
    with pytest.raises(RegardError, match="the text has 5 tokens"):
        look("tiny", b"short", 64)
    with pytest.raises(RegardError, match="expected"):
        look(str(tmp_path), TEXT, 64)
    with pytest.raises(RegardError, match="one row"):
        head_views(models.load("tiny"), torch.ones(1, 20, dtype=torch.long))
    with pytest.raises(RegardError, match="length=1"):
        induction(models.load("tiny"), torch.arange(5), 1)
    assert model_and_reader("tiny")[1].begin == 0
