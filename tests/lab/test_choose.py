"""Choose: quality from a study, costs measured here, the order and its reasons, and every kind of bad input."""

from __future__ import annotations

import json
import math

import pytest

from regard.cli import main
from regard.errors import RegardError
from regard.lab.choose import Needs, Study, choose, read, write_report
from regard.lab.choose.costs import Cost, cost, drawn_out, line_out
from regard.lab.choose.needs import amount
from regard.lab.choose.rank import Row, ranked
from regard.lab.choose.report import caveat
from regard.lab.compare.statistics import Estimate

SHAPE = {"dim": 32, "layers": 3, "heads": 2, "minutes": 1.0}


def run_of(bits, recall):
    return {"language": {"bits": {"1": bits, "4": bits + 1}}, "recall": {"accuracy": {"16": recall}}}


def study_of(**mechanisms):
    """A study of mechanisms with (bits, recall) a seed."""
    found = {
        spec: {task: {str(seed): {**run_of(*run)[task], "loss": []} for seed, run in enumerate(runs)} for task in ("language", "recall")}
        for spec, runs in mechanisms.items()
    }
    settings = {"layers": 2, "dim": 64, "seq_len": 128}
    return Study({"mechanisms": found, "steps": {"language": 300, "recall": 200}, "settings": settings, "versions": {"torch": "2"}})


STUDY = study_of(softmax=[(3.0, 0.9), (3.2, 1.0)], gla=[(2.9, 0.4), (3.1, 0.5)], relu=[(4.0, 0.2), (4.0, 0.2)])


def test_quality_is_the_mean_with_the_pooled_spread():
    found = STUDY.quality("text")
    pooled = math.sqrt((0.02 + 0.02 + 0.0) / 3)  # the variances of three pairs of seeds, one degree of freedom each
    assert found["softmax"].mean == pytest.approx(3.1) and found["gla"].mean == pytest.approx(3.0)
    assert found["relu"].half == pytest.approx(1.96 * pooled / math.sqrt(2)) == found["softmax"].half
    assert STUDY.quality("long-text")["gla"].mean == pytest.approx(4.0)
    assert study_of(softmax=[(3.0, 1.0)]).quality("recall")["softmax"].half is None


def test_costs_of_a_layer():
    """The bytes of softmax's cache and of a recurrent state are known; times are positive and grow with the layers."""
    needs = Needs(1024, **SHAPE)
    dense, state = cost("softmax", needs, 5.0), cost("gla", needs, 5.0)
    assert dense.kept == pytest.approx(3 * 2 * 1024 * 32 * 4, rel=0.01) and dense.measured <= 1024
    far = cost("gla", Needs(2**20, **SHAPE), 0.5)
    assert far.kept == state.kept < dense.kept / 10 and far.measured < 2**20  # constant however long
    assert far.seconds > 10 * state.seconds > 0 and dense.token > 0 and dense.work > 0


def test_numbers_are_drawn_out_by_lines_and_powers():
    assert line_out({256: 100.0, 512: 200.0}, 1024) == 400.0 and line_out({512: 7.0}, 4096) == 7.0
    assert line_out({256: 90.0, 512: 80.0}, 4096) == 80.0  # what fell does not fall on
    prompt, token = (1.0, 2.0), (0.0, 1.0)
    assert drawn_out({256: 1.0, 512: 4.0}, 1024, prompt) == pytest.approx(16.0)
    assert drawn_out({64: 9.0, 256: 1.0, 512: 3.0, 1024: 8.0}, 4096, prompt) == pytest.approx(64.0)  # through the last and the third last
    assert drawn_out({256: 1.0, 512: 9.0}, 1024, prompt) == pytest.approx(36.0)  # no more than the square
    assert drawn_out({256: 5.0, 512: 4.0}, 4096, prompt) == pytest.approx(32.0)  # noise does not make prompts free
    assert drawn_out({256: 5.0, 512: 4.0}, 4096, token) == 4.0 and drawn_out({256: 1.0, 512: 4.0}, 1024, token) == 8.0
    assert drawn_out({512: 3.0}, 512, prompt) == 3.0


def test_order():
    """What fits before what does not; those not told apart from the best by seconds; the others by quality."""

    def row(spec, mean, seconds, fits=True):
        return Row(spec, Estimate(mean, 0.05, 3), Cost(seconds, 0.0, 10.0, 0.0, 4096), fits, False, "", "")

    rows = [row("huge", 0.99, 1.0, False), row("best", 0.9, 3.0), row("near:window=4", 0.85, 1.0), row("far", 0.5, 0.1)]
    found = ranked(rows, Needs(4096, "recall", memory=5))
    assert [one.name for one in found] == ["near", "best", "far", "huge"]
    assert [one.equal for one in found] == [True, True, False, False]
    assert [one.standing for one in found] == ["as good", "best", "behind", "too large"]
    assert "studied with window=4" in found[0].why and "needs 10 bytes of 5 bytes" in found[3].why
    alone = [
        Row("a", Estimate(0.9, None, 1), Cost(3.0, 0, 1, 0, 64), True, False, "", ""),
        Row("b", Estimate(0.8, None, 1), Cost(1.0, 0, 1, 0, 64), True, False, "", ""),
    ]
    assert [one.name for one in ranked(alone, Needs(64, "recall"))] == ["a", "b"]


def test_a_choice_as_a_user_makes_it(tmp_path):
    deep = {**SHAPE, "layers": 60}
    choice = choose(Needs(2048, "recall", memory=15_000_000, **deep), STUDY)
    assert choice.rows[0].name == "gla" and "softmax" in choice.verdict and choice.verdict.startswith("gla: 45%")
    assert [row.name for row in choice.rows if not row.fits] == ["softmax", "relu"]  # caches of 31 MB
    told = json.loads(json.dumps(choice.as_dict()))
    assert told["rows"][0]["cost"]["kept"] < 1_000_000 and told["rows"][0]["seeds"] == 2
    write_report(choice, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2 and "http" not in page.replace("http://www.w3.org/2000/svg", "")
    free = choose(Needs(256, "recall", **SHAPE), STUDY)
    assert free.rows[0].name == "softmax" and all(row.fits for row in free.rows)
    tight = choose(Needs(2048, "recall", memory=10, among=("softmax",), **deep), STUDY)
    assert tight.verdict.startswith("Nothing that was measured fits into 10 bytes; the least needs 3")


def test_what_fails_or_takes_too_long_is_named():
    odd = study_of(softmax=[(3.0, 0.5)], nowhere=[(2.0, 0.9)])
    assert "nowhere" in choose(Needs(256, **SHAPE), odd).left_out
    assert "One seed each" in caveat(choose(Needs(256, **SHAPE), odd)) and "95%" in caveat(choose(Needs(256, **SHAPE), STUDY))
    short = choose(Needs(256, **{**SHAPE, "minutes": 1e-9}), STUDY)
    assert len(short.rows) == 1 and set(short.left_out.values()) == {"the minutes were over"}


def test_the_shipped_study_is_whole():
    study = read()
    for task, good, low in (("text", 4.0, True), ("recall", 0.5, False)):
        found = study.quality(task)
        best = (min if low else max)(one.mean for one in found.values())
        assert len(found) >= 50 and (best < good) is low and all(math.isfinite(one.mean) for one in found.values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"task": "poems"}, "--task"),
        ({"context": 0}, "--context 0"),
        ({"heads": 3}, "--heads 3"),
        ({"minutes": float("nan")}, "--minutes"),
        ({"memory": 0}, "--memory 0"),
        ({"device": "abacus"}, "--device"),
        ({"answer": 0}, "--answer"),
    ],
)
def test_bad_needs(wrong, message):
    with pytest.raises(RegardError, match=message):
        Needs(**{"context": 128, **SHAPE, **wrong})


def test_bad_amounts_names_and_files(tmp_path):
    assert amount("32k", "x") == 32768 and amount("1.5GB", "x") == 3 * 2**29 and amount("512MiB", "x") == 2**29 and amount("7", "x") == 7
    for text in ("0", "-1", "k", "1e3", "ten", ""):
        with pytest.raises(RegardError, match="--context"):
            amount(text, "--context")
    with pytest.raises(RegardError, match="not in the study"):
        choose(Needs(64, among=("mamba",), **SHAPE), STUDY)
    for content in ("", "[]", "{}", '{"mechanisms": {}}'):
        (tmp_path / "study.json").write_text(content)
        with pytest.raises(RegardError, match="expected a JSON file made by"):
            read(tmp_path / "study.json")


def test_the_command(tmp_path, monkeypatch, capsys):
    """A table, JSON and a page; what is wrong is said before anything is measured."""
    monkeypatch.setattr("regard.lab.choose.rank.read", lambda: STUDY)
    shape = ["--context", "128", "--dim", "32", "--layers", "2", "--heads", "2"]

    def said(*arguments):
        monkeypatch.setattr("sys.argv", ["regard", "choose", *shape, *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        out, wrong = capsys.readouterr()
        return end.value.code or 0, out, wrong

    code, out, _ = said("--task", "recall", "--report", str(tmp_path / "deep" / "page.html"))
    assert code == 0 and out.startswith("softmax: ") and "standing" in out and (tmp_path / "deep" / "page.html").exists()
    code, out, _ = said("--json", "--among", "gla")
    assert code == 0 and [row["mechanism"] for row in json.loads(out)["rows"]] == ["gla"]
    (tmp_path / "file").write_text("")
    for wrong in (("--memory", "much"), ("--context", "0"), ("--task", "poems"), ("--report", str(tmp_path / "file" / "page.html"))):
        code, _, message = said(*wrong)
        assert code == 2 and wrong[0] in message, message
