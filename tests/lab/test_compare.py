"""Compare: a tiny run end to end, resuming, and every kind of bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from regard.errors import RegardError
from regard.lab.compare import Config, compare, jobs, run
from regard.lab.compare.launched import launch
from regard.lab.compare.optimizer import Muon
from regard.lab.compare.statistics import Estimate, estimate
from regard.lab.compare.train import TASKS
from regard.lab.compare.verdict import told, verdict
from regard.tasks import copying, python_text, recall

TINY = {"minutes": 0.02, "seq_len": 32, "dim": 16, "lengths": (64, 128), "batch": 2, "parallel": 1}
PLOTS = ("loss", "extrapolation", "recall", "prefill", "memory", "decode", "state")


def test_end_to_end_and_resume(tmp_path, monkeypatch):
    config = Config(("softmax", "gla"), out=tmp_path, **TINY)
    report, finished = compare(config)
    assert finished
    page = (tmp_path / "report.html").read_text()
    for plot in PLOTS:
        assert f'<figure id="{plot}"><svg' in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "") and "src=" not in page and "@import" not in page
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["verdict"] == verdict(report) and set(saved["mechanisms"]) == {"softmax", "gla"}
    assert saved["verdict"].startswith("Too little training to compare")
    one = saved["mechanisms"]["gla"]
    assert one["language"]["0"]["bits"].keys() == {"1", "2", "4"} and one["recall"]["0"]["accuracy"].keys() == {"4", "8", "16"}
    assert saved["mechanisms"]["softmax"]["speed"]["ratio"]["prefill"]["64"] == 1.0
    assert one["language"]["0"]["steps"] == saved["steps"]["language"] == saved["mechanisms"]["softmax"]["language"]["0"]["steps"]

    monkeypatch.setattr(jobs, "train", lambda *a: pytest.fail("finished work was done again"))
    again, _ = compare(config, resume=True)
    assert again["mechanisms"]["gla"]["language"] == one["language"]
    with pytest.raises(RegardError, match="other settings"):
        compare(Config(("softmax", "gla"), out=tmp_path, **{**TINY, "seq_len": 40}), resume=True)


def test_stopping_keeps_finished_results(tmp_path, monkeypatch):
    own = jobs.train

    def stop(config, task, *rest):
        if task == "recall":
            raise KeyboardInterrupt
        return own(config, task, *rest)

    monkeypatch.setattr(jobs, "train", stop)
    report, finished = compare(Config(("softmax",), out=tmp_path, **TINY))
    assert not finished and "0" in report["mechanisms"]["softmax"]["language"]
    assert json.loads((tmp_path / "report.json").read_text())["finished"] is False
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (0.3, 2), (5.0, 1)])
def test_seeds_follow_what_a_round_really_takes(tmp_path, monkeypatch, seconds, rounds):
    """The first round is run in any case, and another one while what the last one took is left of the budget, a second."""

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()

    def train(config, task, spec, seed, steps, corpus, shared):
        clock.now += 1.3 * seconds / 3  # two rounds of 1.3 x 0.3 seconds leave less than a third
        return {"error": "of no interest"}

    monkeypatch.setattr(run, "time", clock)
    monkeypatch.setattr(run, "measure", lambda *a: {})
    monkeypatch.setattr(run, "decide", lambda *a: dict.fromkeys(TASKS, 20))
    monkeypatch.setattr(jobs, "train", train)
    report, finished = compare(Config(("softmax",), out=tmp_path, **{**TINY, "minutes": 1 / 60}))
    assert finished and report["rounds"] == rounds == len(report["mechanisms"]["softmax"]["recall"])


def test_equal_steps_teach_the_tasks_before_there_are_more_of_them(monkeypatch):
    """A step of each task takes one second: below three seeds' worth every task gets its own number of steps, below one seed's fewer."""
    monkeypatch.setattr(run, "results_of", lambda config, jobs, learn: ((job, {"seconds": 1.0}) for job in jobs))
    config = Config(("softmax",), out=Path("unused"), **TINY)
    one = sum(run.ENOUGH.values()) + sum(run.MEASURING.values())
    with run.progress(Console(quiet=True)) as bar:
        assert run.decide(config, bar, 1.1 * one / run.SLACK) == run.ENOUGH
        assert run.decide(config, bar, 2.9 * one / run.SLACK) == run.ENOUGH
        more, less = run.decide(config, bar, 6 * one / run.SLACK), run.decide(config, bar, 0.5 * one / run.SLACK)
    assert all(1.9 < more[task] / run.ENOUGH[task] < 2.2 and 0.4 < less[task] / run.ENOUGH[task] < 0.55 for task in TASKS)


def test_runs_side_by_side_give_the_numbers_of_runs_in_turn():
    steps = {"language": 3, "recall": 2, "copying": 2}
    todo = [jobs.Job(task, name, seed, n) for task, n in steps.items() for name in ("softmax", "gla") for seed in (0, 1)]

    def found(parallel):
        config = Config(("softmax", "gla"), **{**TINY, "parallel": parallel})
        return {job: {key: x for key, x in one.items() if key != "seconds"} for job, one in jobs.results(config, todo)}

    assert found(1) == found(2) and len(found(1)) == len(todo)


def test_processes_that_share_each_batch_train_the_model_of_one(tmp_path):
    """By torchrun with two processes of gloo, DDP and FSDP2: the losses of one process but for rounding; an error of a mechanism is reported, not waited
    for."""
    given = {**TINY, "minutes": 0.01, "seeds": 1}
    alone, _ = compare(Config(("softmax",), out=tmp_path / "one", **given))
    assert launch(Config(("softmax", "sparsemax"), out=tmp_path / "two", **given), 2, False) == 0
    shared = json.loads((tmp_path / "two" / "report.json").read_text())
    assert shared["finished"] and shared["steps"] == alone["steps"]  # the least there are
    for task in TASKS:
        one, two = (report["mechanisms"]["softmax"][task]["0"] for report in (alone, shared))
        assert [x for _, x in two["loss"][:5]] == pytest.approx([x for _, x in one["loss"][:5]], rel=0.2)
        assert two["parameters"] == one["parameters"]
    assert launch(Config(("softmax",), out=tmp_path / "sharded", **given), 2, False, sharded=True) == 0
    sharded = json.loads((tmp_path / "sharded" / "report.json").read_text())
    assert sharded["mechanisms"]["softmax"]["copying"]["0"]["parameters"] == two["parameters"]
    found = [report["mechanisms"]["softmax"]["language"]["0"] for report in (alone, shared, sharded)]
    assert [one["bits"]["1"] for one in found] == pytest.approx(3 * [found[0]["bits"]["1"]], rel=1e-4)
    assert found[2]["sink_mass"] == pytest.approx(found[0]["sink_mass"], rel=1e-3)
    for wrong, message in (((3, False), "cannot be shared equally"), ((0, False), "--processes 0")):
        with pytest.raises(RegardError, match=message):
            launch(Config(("softmax",), out=tmp_path / "no", **given), *wrong)


def test_what_one_run_does_leaves_the_others_alone(monkeypatch):
    def some(config, task, spec, *rest):
        if spec == "gla":
            raise RuntimeError("out of luck")
        return {"bits": {"1": 2.0}}

    monkeypatch.setattr(jobs, "train", some)
    todo = [jobs.Job("language", name, 0, 3) for name in ("gla", "softmax")]
    found = dict(jobs.results(Config(("softmax", "gla"), **TINY), todo))
    assert found[todo[0]] == {"error": "RuntimeError: out of luck"} and found[todo[1]]["bits"]["1"] == 2.0


def dies(config, job, threads, work):
    """What a job does in a process that is killed: it takes the pool with it."""
    if job.spec == "gla":
        os.kill(os.getpid(), signal.SIGKILL)
    return job, {"seconds": 1.0}


def test_a_dead_process_loses_only_its_job(monkeypatch):
    monkeypatch.setattr(jobs, "run", dies)
    todo = [jobs.Job("language", name, seed, 0) for seed in (0, 1) for name in ("softmax", "gla", "softpick")]
    found = dict(jobs.results(Config(("softmax", "gla", "softpick"), **{**TINY, "parallel": 2}), todo))
    assert {job.spec for job in todo if "error" in found[job]} == {"gla"} and len(found) == len(todo)


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
        (["softmax", "--seeds", "0"], "--seeds 0"),
        (["softmax", "--parallel", "0"], "--parallel 0"),
        (["softmax", "--backend", "mpi"], "--backend mpi"),
        (["moba:block=3"], "Did you mean block_size"),
        (["moba:block_size"], "is not key=value"),
        (["softmax", "--heads", "3"], "--heads 3"),
        (["softmax", "--batch", "0"], "--batch 0"),
        (["softmax", "--launch", "slurm"], "--launch slurm"),
        (["softmax", "--launch", "torchrun", "--processes", "3"], "cannot be shared equally"),
        (["softmax", "--processes", "2"], "is of --launch"),
        (["softmax", "--sharded"], "is of --launch"),
        (["softmax", "--launch", "torchrun", "--parallel", "2"], "expected one of the two ways"),
        (["softmax", "--launch", "torchrun", "--text", str(tmp_path / "none.txt")], "does not exist"),
        (["ela", "--task", "digits", "--dim", "32"], "are of the task text"),
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
    few = python_text(2048)  # a document or two, the last tenth of whose bytes is held out
    assert len(few.train) >= 1800 and len(few.valid) > 100
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


def run_of(bits, recall):
    return {
        "language": {"bits": dict.fromkeys("124", bits)},
        "recall": {"accuracy": {"4": recall}},
        "copying": {"accuracy": {"32": recall}},
    }


def report_of(mechanisms):
    """{name: [(bits, recall) of each seed]} as a report."""
    results = {
        name: {task: {str(seed): run_of(*one)[task] for seed, one in enumerate(runs)} for task in ("language", "recall", "copying")}
        for name, runs in mechanisms.items()
    }
    return {"mechanisms": results, "steps": {"language": 3}, "config": {"batch": 2, "seq_len": 32}}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_run_that_diverged_is_neither_best_nor_worst(place):
    runs = [("good", [(2.0, 0.99), (2.01, 0.98), (2.02, 0.99)]), ("fair", [(3.0, 0.5), (3.01, 0.52), (3.02, 0.51)])]
    runs.insert(place, ("broken", [(float("nan"), float("nan"))] * 3))
    said = verdict(report_of(dict(runs)))
    assert "broken diverged" in said and said.count("broken") == 1
    assert "after 192 bytes: good is best, 2.010 ± 0.025; behind it fair 3.010 ± 0.025" in said
    assert "Of 4 key-value pairs recalled: good is best" in said and "Too little" not in said


def test_no_winner_where_intervals_touch_or_one_seed_ran():
    near = {"a": [(2.0, 0.9), (2.3, 0.9), (2.1, 0.9)], "b": [(2.1, 0.9), (2.4, 0.9), (2.2, 0.9)]}
    assert "after 192 bytes: no difference seen" in verdict(report_of(near))
    far = {"a": [(2.0, 0.99)], "b": [(3.5, 0.2)]}
    assert "is best" not in verdict(report_of(far)) and "one seed" in verdict(report_of(far))
    three = {"a": [(2.0, 0.9), (2.02, 0.9)] * 2, "b": [(2.01, 0.9), (2.03, 0.9)] * 2, "c": [(3.0, 0.2), (3.02, 0.2)] * 2}
    assert "a (with b not told apart from it) is best, 2.010 ± 0.018; behind it c" in verdict(report_of(three))


def test_intervals_are_student_s():
    found = estimate([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3) and found.half == pytest.approx(4.303 * 1.5275252 / 3**0.5, rel=1e-4)
    assert estimate([1.0]).half is None and estimate([1.0, float("nan")]) is None and estimate([]) is None


@pytest.mark.parametrize("shape", [(16, 16), (24, 16), (16, 40)])
def test_muon_is_pytorch_s(shape):
    """Up to the bfloat16 in which PyTorch iterates: the same directions and lengths."""
    own, other = (torch.nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).reshape(shape).sin()) for _ in range(2))
    ours, theirs = Muon([own], 0.02), torch.optim.Muon([other], 0.02, weight_decay=0.0)
    for step in range(4):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        own.grad, other.grad = grad.clone(), grad.clone()
        ours.step()
        theirs.step()
    moved = own.detach() - torch.linspace(-1, 1, shape[0] * shape[1]).reshape(shape).sin()
    assert (own - other).norm() < 0.03 * moved.norm()


def test_a_difference_that_is_not_shown_names_no_winner():
    found = {"a": Estimate(0.9999, 0.0, 3), "b": Estimate(0.9991, 0.0, 3), "c": Estimate(0.4, 0.1, 3)}
    assert told("Copied", found, False, ".0%") == "Copied: a (with b not told apart from it) is best, 100% ± 0%; behind it c 40% ± 10%."
