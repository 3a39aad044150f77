"""`regard sweep`: densities counted, controls on either side, files written whole."""

import json

import pytest
import torch

import regard
from regard import Causal, models
from regard.engine import pairs_read
from regard.engine.policy import Policy
from regard.lab.sweep import DEFAULT, Config, method, sweep, write
from regard.lab.sweep.reader import Bytes, model_and_reader
from regard.tasks.text import python_text

pytest.importorskip("transformers")
SMALL = Config(length=512, windows=1, needles=1, depths=(0.2, 0.8), repeats=1)


@pytest.mark.parametrize("name", DEFAULT)
def test_every_default_method_is_sparser_than_dense_at_its_sparsest(name):
    kinds = torch.randn(1, 1, 16, 1, 16)  # neighbours are alike, as in text: blocks that differ within are read densely by some
    q, k, v = ((kinds + 0.3 * torch.randn(1, h, 16, 64, 16)).flatten(2, 3) for h in (4, 2, 2))
    densities = []
    for settings in DEFAULT[name]:
        one = method(name, settings)
        if isinstance(one, Policy):
            one.calibrate([(q[:, :, :300], k[:, :, :300], v[:, :, :300])] * 3)
        with pairs_read() as pairs:
            for layer in range(3):
                _ = one.prompt(layer, q, k, v) if isinstance(one, Policy) else regard.attend(q, k, v, one, mask=Causal())
        densities.append(pairs.read / (3 * 4 * 1024 * 1025 / 2))
    assert all(0 < d <= 1.6 for d in densities) and min(densities) < 0.9, densities


def test_pairs_of_known_masks():
    q = torch.randn(2, 4, 100, 8)
    for mask, count in ((None, 100 * 100), (Causal(), 5050), (Causal() & regard.Window(10), 955)):
        with pairs_read() as pairs:
            regard.attend(q, q[:, :2], q[:, :2], mask=mask)
        assert pairs.read == 8 * count
    regard.attend(q, q, q)
    assert pairs.read == 8 * 955  # nothing counts after the block


def test_sweep_and_report(tmp_path):
    methods = {"oracle": ("blocks=2", "blocks=6"), "random": ("blocks=2",)}
    for result in sweep(models.load("tiny"), Bytes(), python_text(), methods, SMALL, "tiny"):
        pass
    softmax, two, six, chance = result.points
    assert softmax.density == pytest.approx(1.0) and two.density < six.density < 1 and chance.density == pytest.approx(two.density)
    assert two.bits_per_byte < chance.bits_per_byte and abs(six.bits_per_byte - softmax.bits_per_byte) < 0.1
    write(result, tmp_path / "out")
    made = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(made["points"]) == 4 and {p.name for p in (tmp_path / "out").iterdir()} >= {
        "table.md",
        "bits.svg",
        "needles.svg",
        "prefill.svg",
    }


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: method("gla"), "'gla' is not softmax attention over fewer keys"),
        (lambda: method("oracle", "block=3"), "oracle.*unexpected keyword"),
        (lambda: method("flexprefil"), "flexprefill"),
        (lambda: Config(length=10), "expected at least 256 tokens"),
        (lambda: model_and_reader("nowhere"), "model nowhere: expected smollm2-135m or tiny, or a folder"),
    ],
)
def test_errors(call, words):
    with pytest.raises(regard.RegardError, match=words):
        call()
