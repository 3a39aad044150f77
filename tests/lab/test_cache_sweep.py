"""`regard sweep --cache`: kept bytes, controls on either side, an interrupted sweep that goes on, errors of one line."""

import json

import pytest
import torch

import regard
from regard import models
from regard.lab import sweep as lab
from regard.lab.sweep.policies import MADE, retrieval_gates
from regard.tasks.text import python_text

pytest.importorskip("transformers")
SMALL = lab.CacheConfig(length=160, windows=1, steps=6, needles=1, depths=(0.3, 0.9))
METHODS = {"random": ("budget=0.1",), "kivi": ("bits=8,recent=32",), "snapkv": ("budget=0.6",)}


def test_a_sweep_its_report_and_how_it_goes_on(tmp_path):
    model, text = models.load("tiny"), python_text(400_000)
    for count, result in enumerate(lab.cache_sweep(model, lab.Bytes(), text, METHODS, SMALL, "tiny"), 1):
        lab.write_points(result, tmp_path)
        if count == 2:
            break
    done = lab.CacheSweep.read(tmp_path / "report.json")
    assert [p.name for p in done.points] == ["full", "random"]
    before = done.points[1]
    for result in lab.cache_sweep(model, lab.Bytes(), text, METHODS, SMALL, "tiny", done):
        pass
    lab.write_cache(result, tmp_path)
    full, chance, packed, snap = result.points
    assert chance is before and (full.kept, full.agreement, full.divergence, full.same) == (1.0, 1.0, 0.0, 6.0)
    assert chance.kept == pytest.approx(16 / 166, rel=0.01) and chance.bits_per_byte > full.bits_per_byte
    # codes of a byte with a scale and a minimum for each 32 numbers of 4 bytes; 32 values as they came, and the keys after the last whole page
    assert packed.prompt == pytest.approx((160 * 1.25 + (128 * 1.25 + 32 * 4)) / (160 * 8), rel=0.01)
    assert packed.divergence < chance.divergence and packed.held > packed.kept
    assert snap.prompt == pytest.approx(0.6, abs=0.01) and snap.kept == pytest.approx((96 + 6) / 166, rel=0.01)
    made = json.loads((tmp_path / "report.json").read_text())
    assert len(made["points"]) == 4 and set(made["points"][0]["later"]) == {"0.3", "0.9"}
    assert {p.name for p in tmp_path.iterdir()} >= {"table.md", "bits.svg", "needles.svg", "later.svg", "generation.svg"}
    with pytest.raises(regard.RegardError, match="expected the same settings"):
        next(lab.cache_sweep(model, lab.Bytes(), text, METHODS, lab.CacheConfig(length=161), "tiny", done))


def test_every_default_is_made_and_bad_names_are_refused(tmp_path):
    gates = torch.rand(4, 4)
    every = lab.chosen_policies([])
    assert set(every) == set(MADE) and list(every)[:2] == ["full", "random"]
    for name, settings in every.items():
        for one in settings:
            lab.policy(name, one, lambda: gates)
    assert lab.chosen_policies(["snapkv", "random:budget=0.3", "h2o:budget=8"])["random"] == ("budget=0.3",)
    for call, words in (
        (lambda: lab.chosen_policies(["snap"]), "snapkv"),
        (lambda: lab.policy("h2o", "size=3", lambda: gates), "h2o:size=3.*unexpected keyword"),
        (lambda: lab.policy("h2o", "budget=0.0", lambda: gates), "budget=0.0"),
        (lambda: lab.CacheConfig(length=100), "expected at least 128 tokens"),
        (lambda: lab.CacheConfig(depths=(2.0,)), "expected shares"),
        (lambda: lab.CacheSweep.read(tmp_path / "none.json"), "no report of a sweep"),
    ):
        with pytest.raises(regard.RegardError, match=words):
            call()


def test_gates_rank_key_heads_by_what_they_copy():
    model = models.load("tiny")
    gates = retrieval_gates(model, lab.Bytes(), bytes(python_text(100_000).train.tolist()), 128, prompts=2)
    assert gates.shape == (4, 4) and sorted(gates.flatten().tolist()) == pytest.approx([n / 15 for n in range(16)])
