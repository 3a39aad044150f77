"""Models converted to half precision: sums over many tokens are kept in single precision."""

import sys

import pytest
import torch

pytest.importorskip("transformers")
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems import liger, lolcats

CONVERT = {
    "liger gla": lambda model: liger.convert_liger(model, "gla", 4),
    "liger hgrn2": lambda model: liger.convert_liger(model, "hgrn2", 4),
    "liger gsa": lambda model: liger.convert_liger(model, "gsa", 4, slots=5),
    "lolcats": lambda model: lolcats.convert_lolcats(model, 4, 5),
    "lolcats exact": lambda model: lolcats.convert_lolcats(model, 4, 5, stabilise="exact"),
}


@pytest.mark.parametrize("name", CONVERT)
def test_sums_are_single_precision(name, monkeypatch):
    model, seen = llama(layers=1).float(), []
    (layer,) = CONVERT[name](model).students.values()
    module = sys.modules[type(layer).__module__]
    for called in ("step", "window_sums"):

        def remember(*given, real=getattr(module, called), called=called, **inputs):
            seen.append((called, {x.dtype for x in (*given, *inputs.values()) if torch.is_tensor(x) and x.is_floating_point()}))
            return real(*given, **inputs)

        monkeypatch.setattr(module, called, remember)
    ids = torch.randint(1, 50, (2, 12))
    with torch.no_grad():
        truth, half = model(ids, use_cache=False).logits, model.bfloat16()(ids, use_cache=False).logits
    assert sorted(seen[2:]) == [("step", {torch.float32}), ("window_sums", {torch.float32})] and half.dtype == torch.bfloat16
    assert float((half.float() - truth).norm()) < 0.1 * float(truth.norm())


@pytest.mark.parametrize("convert", [liger.convert_liger, lolcats.convert_lolcats])
def test_layers_by_number_and_options_by_name(convert):
    model = llama(layers=3)
    found = convert(model, layers=[2], window=7)
    assert list(found.students) == ["model.layers.2.self_attn"] and next(iter(found.students.values())).window == 7
    found.restore()
    assert {type(layer.self_attn).__name__ for layer in model.model.layers} == {"LlamaAttention"}
    (layer,) = convert(llama(layers=1)).students.values()
    assert layer.window == 64
    if convert is liger.convert_liger:
        assert (layer.kind, layer.share, layer.tau, layer.slots) == ("gla", 0.5, 16.0, 128)
    else:
        assert (
            layer.query_map.shape == (4, 8, 64)
            and layer.eps == 1e-12
            and (layer.form, layer.affine, layer.stabilise) == ("softmax", False, "reference")
        )
        assert float(torch.sigmoid(layer.gamma).mean()) == pytest.approx(0.1) and torch.equal(layer.query_map, layer.key_map)
