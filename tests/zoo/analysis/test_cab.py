"""CAB beyond its checks: what the tasks ask, the declarations of the whole registry, the command, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from regard import RegardError
from regard.catalog.registry import names
from regard.lab.memory import peak_bytes
from regard.nn.pattern_net import PATTERNS, PatternNet, declared, layer_of, supported
from regard.tasks.long_sequences import FRAMES, IGNORE, MASKED, WORDS, sphere, tasks, voices
from regard.tasks.pattern_scores import compositional_index, efficiency_length
from regard.tasks.sequence_measures import chamfer, f_score, psnr, rouge, ssim
from regard.zoo.analysis import cab as module
from regard.zoo.analysis.cab import cab


def draw(name, pattern, length=66, count=5, seed=0):
    return tasks(length)[name, pattern].draw(count, torch.Generator().manual_seed(seed))


def test_the_patterns_of_the_benchmark_hold_its_tasks():
    held = {p: {n for n, at in tasks(64) if at == p} for p in PATTERNS}
    assert held["noncausal self"] == {"speech", "summary", "resolution", "masked language"}
    assert held["causal self"] == {"speech", "summary", "language"}
    assert held["noncausal cross"] == {"points", "forecast"} and held["causal cross"] == {"speech", "summary"}


@pytest.mark.parametrize("key", list(tasks(64)), ids=" ".join)
def test_tasks_are_drawn_alike_from_a_seed_and_fit_their_nets(key):
    one, same, other = (draw(*key, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.answer, same.answer) and not torch.equal(one.answer, other.answer)
    cell = tasks(66)[key]
    with torch.no_grad():
        net = PatternNet(cell.source, cell.target, cell.outputs, {} if cell.own else {"causal self": "", "noncausal cross": "softmax"})
        single = draw(*key, count=1)
        out = net(single.source, single.target)
    assert out.shape[:2] == single.answer.shape[:2] and math.isfinite(float(cell.loss(out, single)))
    assert all(math.isfinite(measure(out, single)) for measure, _ in cell.measures.values())


def test_answers_follow_from_what_is_read():
    told = draw("speech", "causal self")
    table, frame = voices(), torch.zeros(5, FRAMES)
    for t in range(66):
        frame = 0.7 * frame + 0.3 * table[told.source[:, t], :-1]
        assert torch.allclose(frame, told.answer[:, t], atol=1e-5)
    assert torch.equal(told.target[:, 1:], told.answer[:, :-1]) and not told.target[:, 0].any()
    assert draw("speech", "noncausal self").target is None and set(table[:, -1].tolist()) <= {1.0, 2.0, 3.0}

    text = draw("summary", "causal cross")
    for row, answer, target in zip(text.source.tolist(), text.answer.tolist(), text.target.tolist()):
        marked = sorted(x for x in row if x >= WORDS)
        assert [x // WORDS for x in marked] == [1, 2, 3, 4] and [x % WORDS for x in marked] == answer
        assert target == [0, *answer[:-1]]

    series = draw("forecast", "noncausal cross")
    assert series.source.shape == (5, 44, 6) and series.target.shape == (5, 22, 4) and series.answer.shape == (5, 22, 2)
    at = torch.arange(66.0)
    assert torch.allclose(torch.cat((series.source[0, :, 2], series.target[0, :, 0])), (2 * math.pi * at / 8).sin(), atol=1e-4)
    assert torch.allclose(series.target[2, :, 3], (2 * math.pi * at[44:] / 24).cos(), atol=1e-4)

    shape = draw("points", "noncausal cross")
    seen = torch.cdist(shape.source, shape.answer).amin(2)
    assert shape.source.shape == (5, 33, 3) and float(seen.max()) < 1e-3 and torch.allclose(sphere(66).norm(dim=1), torch.ones(66))
    assert float(torch.cdist(sphere(66), sphere(66)).fill_diagonal_(9).amin(1).min()) > 0.2

    hidden = draw("masked language", "noncausal self")
    assert torch.equal(hidden.source == MASKED, hidden.answer != IGNORE) and ((hidden.source == MASKED).sum(1) == 10).all()
    plain = draw("language", "causal self")
    assert torch.equal(plain.target[:, 1:], plain.answer[:, :-1]) and plain.target.shape == (5, 66)

    picture = draw("resolution", "noncausal self", 110)
    whole, low = (x[..., 0].unflatten(1, (10, 10)) for x in (picture.answer, picture.source))
    means = whole.unflatten(1, (5, 2)).unflatten(3, (5, 2)).mean((2, 4))
    assert torch.allclose(low[:, ::2, ::2], means, atol=1e-6) and torch.equal(low[:, ::2], low[:, 1::2])
    assert float(whole.min()) >= 0 and float(whole.max()) <= 1


def test_measures_meet_scikit_image_and_their_ends():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = torch.rand(1, 11, 9, dtype=torch.float64), torch.rand(1, 11, 9, dtype=torch.float64)
    assert ssim(a, b) == pytest.approx(metrics.structural_similarity(a[0].numpy(), b[0].numpy(), data_range=1.0))
    assert psnr(a, b) == pytest.approx(metrics.peak_signal_noise_ratio(a[0].numpy(), b[0].numpy(), data_range=1.0))
    assert ssim(a, a) == pytest.approx(1) and psnr(a, a) == pytest.approx(100)
    ids = torch.tensor([[3, 1, 2]])
    assert rouge(ids, ids, "2") == rouge(ids, ids, "L") == 100 and rouge(ids, ids + 9, "1") == 0 and rouge(ids[:, :1], ids[:, :1], "2") == 0
    x = torch.rand(2, 4, 3, requires_grad=True)
    chamfer(x, x.detach()).backward()
    assert bool(x.grad.isfinite().all()) and f_score(x.detach(), x.detach() + 5) == 0


SOME = ("shaped-transformer", "tapa", "draftattention", "nabla", "vmoba", "neighborhood", "routing-transformer", "nha", "mqa", "cosformer")


def test_every_mechanism_is_declared():
    for name in names():
        said = declared(name)
        assert set(said) == set(PATTERNS) and said["noncausal self"] == said["noncausal cross"]


def test_only_these_break_what_their_description_says():
    broken = set()
    for name in SOME:
        said, found = declared(name), supported(name)
        assert all(found[p] for p in PATTERNS if said[p])
        broken |= {(name, p) for p in PATTERNS if found[p] and not said[p]}
    places = {("shaped-transformer", "causal cross"), ("tapa", "causal cross")}  # count from the end of the keys
    grids = {(name, "noncausal cross") for name in ("draftattention", "nabla", "vmoba")}  # tokens of one grid
    assert broken == places | grids


def test_refusals_name_the_mechanism_the_pattern_and_the_reason():
    with pytest.raises(RegardError, match=r"'gla' does not support the pattern 'causal cross': reads earlier tokens alone"):
        layer_of("gla", "causal cross", 16, 2)
    with pytest.raises(RegardError, match="expected one of noncausal self"):
        layer_of("gla", "sideways", 16, 2)
    assert set(declared("set-transformer").values()) == {"a module, neither a mechanism nor a layer that steps through a sequence"}
    with pytest.raises(RegardError, match="source is missing"):
        PatternNet(4, 4, 2, {})(None, torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(RegardError, match="target is given"):
        PatternNet(4, 0, 2, {})(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(RegardError, match="one of the two"):
        PatternNet(0, 0, 2, {})
    for length in (62, 65):
        with pytest.raises(RegardError, match="even number, 64 or more"):
            tasks(length)
    for methods in ([], ["softmax", "softmax"], ["none"]):
        with pytest.raises(RegardError, match="each once"):
            cab(methods)
    with pytest.raises(RegardError, match="steps=0"):
        cab(["softmax"], steps=0)
    with pytest.raises(RegardError, match="three or more"):
        efficiency_length([1, 2], [1, 2], [1, 2])
    with pytest.raises(RegardError, match="finite"):
        efficiency_length([1, 2, 3], [1, 2, math.nan], [1, 2, 3])
    with pytest.raises(RegardError, match="expected finite"):
        compositional_index({"x": {"t": {"m": math.inf}}}, {("t", "m"): True})


def test_the_slot_of_the_pattern_holds_the_method_and_the_others_softmax():
    torch.manual_seed(0)
    ids = torch.randint(5, (2, 9))
    for pattern, causal in (("causal self", True), ("causal cross", True), ("noncausal self", True)):
        net = PatternNet(5, 5, 3, {pattern: "hedgehog"}, depth=2).eval().double()
        target = ids[:, :7].clone()
        before = net(ids, target)
        target[:, 4:] = (target[:, 4:] + 1) % 5
        assert torch.allclose(net(ids, target)[:, :4], before[:, :4]) is causal
        kinds = {type(block.cross.mechanism).__name__ for block in net.decoder}
        assert kinds == ({"Recurrent"} if pattern == "causal cross" else {"Weighted"}) and len(net.encoder) == 2
    given = PatternNet(5, 5, 3, {"causal self": "", "noncausal cross": "softmax"}).double()
    assert given.decoder[0].own is None
    apart = PatternNet(5, 5, 3, {"noncausal cross": "none", "noncausal self": "none"}).double().eval()
    assert torch.allclose(apart(ids, ids), apart((ids + 1) % 5, ids))  # nothing of the source comes through


def test_a_small_run_reports_everything():
    report = cab(["softmax", "gla"], steps=1, samples=2, batch=2, dim=16, lengths=(16, 32, 64), peak=peak_bytes)
    found = json.loads(json.dumps(report.as_dict()))
    assert set(found["refused"]["gla"]) == set(PATTERNS) - {"causal self"} and not found["refused"]["softmax"]
    assert found["index"]["causal self"].keys() == {"softmax", "gla"} and found["index"]["causal cross"] == {"softmax": 0.0}
    assert found["scores"].keys() == {"softmax", "gla", "none"} and found["scores"]["gla"].keys() == {"causal self"}
    assert sum(found["index"]["causal self"].values()) == pytest.approx(0, abs=1e-9)
    assert list(found["perplexity"]["gla"]) == ["32", "64", "128", "256"] and found["efficiency"]["gla"].keys() == {"time", "memory"}
    own, none = (found["scores"][m]["causal self"]["language"]["perplexity"] for m in ("gla", "none"))
    assert found["benefit"]["gla"]["causal self"]["language"]["perplexity"] == pytest.approx(none - own)
    assert found["scores"]["gla"]["causal self"]["language"]["perplexity"] == pytest.approx(found["perplexity"]["gla"]["64"])
    assert report.__rich__().row_count == 2 and report.refusals()[0].startswith("gla: not noncausal self, noncausal cross, causal cross: ")
    assert len(found["correlation"]) == 6


def test_the_command_refuses_what_it_does_not_know():
    for words, said in (
        (["nothing", "softmax"], "expected cab"),
        (["cab", "softmaxx"], "softmaxx"),
        (["cab", "softmax", "--seeds", "0"], "--seeds 0"),
    ):
        code = f"import sys; sys.argv = {['regard', 'bench', *words]!r}\nfrom regard.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr and not done.stdout


def test_the_report_is_put_together_by_hand(monkeypatch):
    """Trainings, measurements and costs that say who asked for them: every number of the report by hand."""
    trained, measured, cost = [], [], []

    def train(spec, cell, pattern, seed, steps, batch, lr, length, **sizes):
        trained.append((spec, pattern, seed, steps, batch, lr, length, tuple(sizes.items())))
        return spec, pattern, seed

    def measure(net, cell, count):
        measured.append((net, count))
        spec, _, seed = net
        text = cell.draw(1, torch.Generator().manual_seed(0)).answer
        longer = 0 if "perplexity" not in cell.measures else text.shape[1]
        return {name: 10 * seed + {"softmax": 1, "gla": 3, "none": 0}[spec] + len(name) + longer for name in cell.measures}

    def costs(spec, pattern, lengths, dim, heads, peak):
        cost.append((spec, pattern, tuple(lengths), dim, heads, peak))
        return [
            [n * n if spec == "vanilla" else 50 * n for n in lengths],
            [n * n if spec == "vanilla" else 80 * n for n in lengths] if peak else [],
        ]

    monkeypatch.setattr(module, "trained", train)
    monkeypatch.setattr(module, "measured", measure)
    monkeypatch.setattr(module, "costs", costs)
    found = cab(
        ["softmax", "gla"], length=64, steps=7, batch=2, lr=0.5, seeds=(0, 2), samples=3, dim=8, heads=2, depth=3, lengths=(10, 20, 40)
    )
    assert {one[3:] for one in trained} == {(7, 2, 0.5, 64, (("dim", 8), ("heads", 2), ("depth", 3)))} and {one[1] for one in measured} == {
        3
    }
    cells, kept = tasks(64), {spec: supported(spec, 8, 2) for spec in ("softmax", "gla")}
    assert [(spec, pattern, seed) for spec, pattern, seed, *_ in trained] == [
        (spec, pattern, seed)
        for _, pattern in cells
        for spec in ("softmax", "gla", "none")
        if spec == "none" or not kept[spec][pattern]
        for seed in (0, 2)
    ]
    for (name, pattern), cell in cells.items():
        for spec, level in (("softmax", 1), ("gla", 3), ("none", 0)):
            if spec != "none" and kept[spec][pattern]:
                assert pattern not in found.scores.get(spec, {}) and found.refused[spec][pattern] == kept[spec][pattern]
                continue
            own = {key: 10 + level + len(key) + (64 if "perplexity" in cell.measures else 0) for key in cell.measures}
            assert found.scores[spec][pattern][name] == own
            if spec != "none":
                gain = {key: (1 if up else -1) * level for key, (_, up) in cell.measures.items()}
                assert found.benefit[spec][pattern][name] == gain
            if name == "language":
                assert found.perplexity[spec] == {str(n): 10 + level + len("perplexity") + n for n in (32, 64, 128, 256)}
    assert {one[2:] for one in cost} == {((10, 20, 40), 8, 2, None)} and cost[0][0] == "vanilla"
    assert {spec: set(own) for spec, own in found.efficiency.items()} == {"softmax": {"time"}, "gla": {"time"}}
    assert found.efficiency["gla"]["time"] == pytest.approx(50.0)
    for pattern in PATTERNS:
        methods = [spec for spec in ("softmax", "gla") if not kept[spec][pattern]]
        assert set(found.index[pattern]) == set(methods)
    with_bytes = cab(["softmax"], steps=1, peak=lambda call: 0, lengths=(10, 20, 40))
    assert with_bytes.efficiency["softmax"] == {"time": pytest.approx(50.0), "memory": pytest.approx(80.0)}
    assert {one[5:7] for one in trained[-3:]} == {(3e-3, 64)} and trained[-1][3:5] == (1, 8)


def test_costs_are_of_calls_behind_a_warm_up(monkeypatch):
    clock, calls = iter(range(1000)), []
    ticks = iter([0, 100, 0, 3, 0, 9, 0, 5, *([0, 1] * 4)])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    found = module.costs("vanilla", "causal self", [4, 6], 8, 2, lambda call: calls.append(call().shape) or next(clock), repeats=3)
    assert found == [[5, 1], [0.0, 1.0]] and calls == [(1, 4, 8), (1, 6, 8)]
    ticks = iter([0, 7, 0, 2])
    assert module.costs("softmax", "causal self", [4], 8, 2, None, repeats=1) == [[2], []]


def test_measurements_are_of_samples_that_training_does_not_draw():
    cell = tasks(64)["language", "causal self"]
    net = PatternNet(cell.source, cell.target, cell.outputs, {"causal self": "softmax"}, context_len=64, dim=8, heads=2, depth=1)
    data = cell.draw(5, torch.Generator().manual_seed(2**31))
    with torch.no_grad():
        out = net(data.source, data.target)
    assert module.measured(net, cell, 5) == {name: measure(out, data) for name, (measure, _) in cell.measures.items()}
    assert module.mean([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}]) == {"a": 2.0, "b": 3.0}
