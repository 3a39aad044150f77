"""Compare on images: which layers fit and why not, a small run end to end, resuming, bad input."""

import json

import pytest
import torch

from regard import RegardError
from regard.lab.compare import VisionConfig, compare_layers, vision
from regard.lab.compare.jobs import Job
from regard.lab.compare.slots import Fitted, fitted, fitting, net_of

TINY = {"steps": 3, "seeds": 2, "parallel": 1, "batch": 4, "widths": (16,)}


@pytest.mark.parametrize(
    ("spec", "layout"),
    [
        ("cbam:reduction=4", "map"),
        ("litv2-hilo:heads=2", "tokens"),
        ("convit", "tokens"),
        ("mambaout", "map, channels last"),
        ("softmax", "tokens"),
        ("mala", "map"),
    ],
)
def test_layers_stand_in_the_slot_in_their_own_layout(spec, layout):
    torch.manual_seed(0)
    layer = fitted(spec, 16, 4).eval()
    assert isinstance(layer, Fitted) and layer.layout == layout
    x = torch.randn(2, 16, 4, 4)
    truth = {"map": layer.layer, "tokens": lambda y: layer.layer(y.flatten(2).mT).mT.reshape(2, 16, 4, 4)}.get(
        layout, lambda y: layer.layer(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    )(x)
    torch.testing.assert_close(layer(x), truth)
    net = net_of(spec, 8, (16, 16), 3)
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 3) and isinstance(net.blocks[1].slot, Fitted)


def test_what_does_not_fit_says_why():
    for spec, why in (
        ("token-pooling", "is no layer but a function"),
        ("csa", "also needs sem, feat"),
        ("a2n", "no width"),
        ("attention-cl", "as map: .*; as tokens: "),
        ("gla", "is no layer but a mechanism"),
        ("cbamm", "Did you mean"),
    ):
        with pytest.raises(RegardError, match=why):
            VisionConfig((spec,), **TINY)
    names = fitting()
    assert (
        len(names) >= 20
        and {"cbam", "contmix", "mamba-yolo", "hyperzzw", "mossformer", "mala", "dependencyvit"} <= set(names)
        and "csa" not in names
    )


@pytest.mark.parametrize("task", vision.TASKS)
def test_every_task_is_drawn_and_learned_from(task):
    config = VisionConfig(("ela",), task, **TINY)
    assert config.side == vision.TASKS[task].side
    x, y = vision.drawn(config, 300, torch.Generator().manual_seed(0))
    assert x.shape == (300, 3, config.side, config.side) and y.unique().tolist() == list(range(vision.TASKS[task].classes))
    held, _ = vision.drawn(config, 300, torch.Generator().manual_seed(0), held_out=True)
    assert ("digits" in task) != torch.equal(x, held)
    model, losses = vision.fit(config, "none", 0, 3)
    assert len(losses) == 3 and model(x[:2]).shape == (2, vision.TASKS[task].classes)
    with pytest.raises(RegardError, match="expected at least"):
        VisionConfig(("ela",), task, side=config.side - 1)


def test_end_to_end_and_resume(tmp_path, monkeypatch):
    config = VisionConfig(("ela", "van-lka:kernel=9,dilation=2"), out=tmp_path, minutes=10, **TINY)
    report, finished = compare_layers(config)
    assert (
        finished
        and report["steps"] == 3
        and report["rounds"] == 2
        and set(report["mechanisms"]) == {"none", "ela", "van-lka:kernel=9,dilation=2"}
    )
    page, table = (tmp_path / "report.html").read_text(), (tmp_path / "table.md").read_text()
    assert '<figure id="loss"><svg' in page and '<figure id="size"><svg' in page and "van-lka:kernel=9" in page and table.count("\n") == 5
    one = report["mechanisms"]["ela"]
    assert one["parameters"] == sum(p.numel() for p in net_of("ela", 8, (16,), 10).parameters()) and one["time"] > 0
    assert report["mechanisms"]["none"]["time"] == 1.0 and one["flops"] > report["mechanisms"]["none"]["flops"]
    assert set(one["digits"]) == {"0", "1"} and 0 <= one["digits"]["0"]["accuracy"] <= 1 and one["digits"]["0"]["steps"] == 3
    assert (
        report["verdict"].startswith("Too little training")
        and json.loads((tmp_path / "report.json").read_text())["verdict"] == report["verdict"]
    )
    monkeypatch.setattr(vision, "fit", lambda *a: pytest.fail("finished work was done again"))
    again, _ = compare_layers(config, resume=True)
    assert again["mechanisms"]["ela"]["digits"] == json.loads(json.dumps(one["digits"]))
    monkeypatch.undo()
    more, _ = compare_layers(VisionConfig(("ela",), out=tmp_path, minutes=10, **{**TINY, "seeds": 3}), resume=True)
    assert (
        set(more["mechanisms"]["ela"]["digits"]) == {"0", "1", "2"} and more["rounds"] == 3 and set(more["mechanisms"]) == {"none", "ela"}
    )
    with pytest.raises(RegardError, match="other settings"):
        compare_layers(VisionConfig(("ela",), out=tmp_path, minutes=10, **{**TINY, "steps": 4}), resume=True)


def test_runs_are_repeatable_and_budgets_are_kept():
    config = VisionConfig(("ela",), **TINY)
    a, b = (vision.work(config, Job("digits", "ela", 1, 5)) for _ in range(2))
    assert a["loss"] == b["loss"] and a["accuracy"] == b["accuracy"] and vision.work(config, Job("digits", "ela", 1, 0))["seconds"] > 0
    free = VisionConfig(("ela",), parallel=1)
    assert (
        vision.decided(free, 0.1, 10_000) == (400, 3) and vision.decided(free, 0.1, 30)[1] == 2 and vision.decided(free, 0.1, 1) == (20, 1)
    )
    steps, rounds = vision.decided(free, 0.1, 100)
    assert 20 <= steps <= 400 and rounds * (steps + vision.MEASURING) * 0.1 <= 100
    hidden = VisionConfig(("ela",), "occluded-digits", **TINY)
    x, _ = vision.drawn(hidden, 8, torch.Generator().manual_seed(0))
    assert bool(((x == 0).all(3).all(1).sum(1) == 2).all())


def test_refusals():
    for options, why in (
        ({"task": "cats"}, "expected text or one of digits"),
        ({"layers": ("ela", "ela")}, "given twice"),
        ({"layers": ("none",)}, "not at all"),
        ({"minutes": 0}, "positive number"),
        ({"seeds": 0}, "expected 1 to 100"),
        ({"parallel": 0}, "between 1 and 1024"),
        ({"backend": "threads"}, "loky, ray, dask"),
        ({"side": 4}, "at least 8"),
    ):
        with pytest.raises(RegardError, match=why):
            VisionConfig(**{"layers": ("ela",), **options})
