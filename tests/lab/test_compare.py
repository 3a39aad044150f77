"""Compare: a tiny run end to end, resuming, and every kind of bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from regard.errors import RegardError
from regard.lab.compare import Config, compare
from regard.lab.compare import run as runner
from regard.lab.compare.verdict import verdict
from regard.tasks import copying, python_text, recall

TINY = {"minutes": 0.02, "seq_len": 32, "dim": 16, "lengths": (64, 128), "batch": 2}


def test_end_to_end_and_resume(tmp_path, monkeypatch):
    config = Config(("softmax", "gla"), out=tmp_path, **TINY)
    report, finished = compare(config)
    assert finished
    page = (tmp_path / "report.html").read_text()
    for plot in ("loss", "extrapolation", "recall", "prefill", "memory", "decode", "state"):
        assert f'<figure id="{plot}"><svg' in page
    assert (
        "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")
        and "<script" not in page
    )
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["verdict"] == verdict(report) and set(saved["mechanisms"]) == {"softmax", "gla"}
    one = saved["mechanisms"]["gla"]
    assert one["language"]["valid_bits"].keys() == {"1", "2", "4"} and one["synthetic"]["recall"].keys() == {"4", "8", "16"}
    assert saved["mechanisms"]["softmax"]["speed"]["ratio"]["prefill"]["64"] == 1.0
    assert one["language"]["tokens"] == saved["mechanisms"]["softmax"]["language"]["tokens"]

    monkeypatch.setattr(runner, "train_language", lambda *a: pytest.fail("finished work was done again"))
    again, _ = compare(config, resume=True)
    assert again["mechanisms"]["gla"]["language"] == one["language"]
    with pytest.raises(RegardError, match="other settings"):
        compare(Config(("softmax", "gla"), out=tmp_path, **{**TINY, "seq_len": 40}), resume=True)


def test_stopping_keeps_finished_results(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "train_synthetic", stop)
    report, finished = compare(Config(("softmax",), out=tmp_path, **TINY))
    assert not finished and "language" in report["mechanisms"]["softmax"]
    assert json.loads((tmp_path / "report.json").read_text())["finished"] is False
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]


def bad_inputs(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "tiny.txt").write_text("hello")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "file").write_text("x")
    return [
        (["sofmax"], "Did you mean softmax"),
        (["softmax", "softmax"], "given twice"),
        (["soft"], "cannot be trained"),
        (["softmax", "--text", str(tmp_path / "none.txt")], "does not exist"),
        (["softmax", "--text", str(tmp_path / "empty.txt")], "is empty"),
        (["softmax", "--text", str(tmp_path / "tiny.txt")], "expected at least"),
        (["softmax", "--text", str(tmp_path / "binary.txt")], "is binary"),
        (["softmax", "--text", str(tmp_path)], "is not a file"),
        (["softmax", "--out", str(tmp_path / "file" / "x")], "cannot write"),
        (["softmax", "--seq-len", "3"], "--seq-len"),
        (["softmax", "--seq-len", "100000000"], "--seq-len"),
        (["softmax", "--minutes", "-1"], "--minutes"),
        (["softmax", "--minutes", "nan"], "--minutes"),
        (["softmax", "--minutes", "soon"], "minutes"),
        (["moba:block=3"], "Did you mean block_size"),
        (["moba:block_size"], "is not key=value"),
    ]


def test_bad_input_is_one_line_and_status_2(tmp_path):
    from regard import cli

    for arguments, words in bad_inputs(tmp_path):
        script = f"import sys; sys.argv = {['regard', 'compare', *arguments]!r}; from regard.cli import main; main()"
        done = (
            subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
            if arguments == ["sofmax"]
            else None
        )
        if done is None:  # the rest in this process, which is quicker
            code, text = in_process(cli, arguments, tmp_path)
        else:
            code, text = done.returncode, done.stderr
        assert code == 2 and words in text and len(text.strip().splitlines()) == 1, (arguments, code, text)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "runs") == ["binary.txt", "empty.txt", "file", "tiny.txt"]


def in_process(cli, arguments, tmp_path):
    import contextlib
    import io

    text, old, where = io.StringIO(), sys.argv, os.getcwd()
    sys.argv = ["regard", "compare", *arguments]
    os.chdir(tmp_path)
    try:
        with contextlib.redirect_stderr(text), pytest.raises(SystemExit) as exit:
            cli.main()
    finally:
        sys.argv = old
        os.chdir(where)
    return exit.value.code, text.getvalue()


def test_recall_task_has_the_answers_it_asks_for():
    tokens, labels = recall(16, 64, 8, 64, torch.Generator().manual_seed(0))
    for row, asked in zip(tokens, labels, strict=True):
        stored = dict(zip(row[:16:2].tolist(), row[1:16:2].tolist(), strict=True))
        places = (asked >= 0).nonzero().flatten()
        assert len(stored) == len(places) == 8
        assert all(stored[int(row[p])] == int(asked[p]) and p % 2 == 0 and p >= 16 for p in places)
    with pytest.raises(RegardError, match="expected at most"):
        recall(1, 16, 8, 64, torch.Generator())


def test_copying_task():
    tokens, labels = copying(4, 21, 16, torch.Generator().manual_seed(0))
    assert torch.equal(labels[:, 10:20], tokens[:, :10]) and (labels[:, :10] == -100).all()
    assert torch.equal(tokens[:, 11:], tokens[:, :10])


def test_text_is_split_without_overlap():
    found = python_text(200_000)
    assert len(found.train) > 5 * len(found.valid) > 0
    assert found.batch(3, 16, torch.Generator()).shape == (3, 17)
    assert found.held_out(64, 5).shape == (5, 65)


BROKEN = {"a list": b"[]", "null": b"null", "not UTF-8": b"\xff\xfe\x00", "truncated": b'{"fingerprint": ', "foreign": b'{"a": 1}'}


@pytest.mark.parametrize("case", BROKEN)
def test_resume_from_what_is_no_report(case, tmp_path):
    (tmp_path / "report.json").write_bytes(BROKEN[case])
    with pytest.raises(RegardError, match="--resume"):
        compare(Config(("softmax",), out=tmp_path), resume=True)


def test_nothing_is_left_when_the_text_cannot_be_read(tmp_path):
    with pytest.raises(RegardError):
        compare(Config(("softmax",), text=tmp_path / "missing.txt", out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_seeds_out_of_range(seed):
    with pytest.raises(RegardError, match=f"--seed {seed}"):
        Config(("softmax",), seed=seed)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_run_that_diverged_is_neither_best_nor_worst(place):
    def one(bits, recall):
        return {"language": {"valid_bits": dict.fromkeys("124", bits), "tokens": 9}, "synthetic": {"recall": {"4": recall}, "copying": recall}}

    runs = [("good", one(2.0, 0.9)), ("fair", one(3.0, 0.5))]
    runs.insert(place, ("broken", one(float("nan"), float("nan"))))
    said = verdict({"mechanisms": dict(runs)})
    assert "broken diverged" in said and "good needs the fewest bits" in said and "fair the most" in said and "good recalls the most" in said
    assert said.count("broken") == 1
