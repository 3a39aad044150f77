"""WGQA: bad input, and a converted model that trains."""

import pytest
import torch

from regard import RegardError
from regard.lab.checks.shared.decoding import llama
from regard.nn import Attention
from regard.zoo.systems.wgqa import convert_wgqa, to_wgqa


def test_a_converted_model_learns_and_generates():
    model, ids = convert_wgqa(llama(kv_heads=4), 1, mode="col"), torch.randint(1, 50, (2, 6))
    loss = model(ids, labels=ids).loss
    loss.backward()
    mix = model.model.layers[0].self_attn.k_proj.mix
    assert mix.shape == (4, 1, 8) and mix.grad.abs().max() > 0 and model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert model(out[:, :9], use_cache=False).logits[:, -1].argmax(-1).equal(out[:, 9])


def test_bad_input():
    layer = Attention(16, 4)
    for bad, why in (
        ({"groups": 3}, "groups=3"),
        ({"groups": 0}, "groups=0"),
        ({"groups": 2, "mode": "rows"}, "mode='rows'"),
        ({"groups": 2, "init": "middle"}, "init='middle'"),
        ({"groups": 2, "init": torch.ones(4)}, r"expected \(4, 1, 1\)"),
    ):
        with pytest.raises(RegardError, match=why):
            to_wgqa(layer, **bad)
    to_wgqa(layer, 2)
    with pytest.raises(RegardError, match="fold_wgqa it first"):
        to_wgqa(layer, 1)
    for bad in (torch.nn.Linear(2, 2), torch.nn.MultiheadAttention(4, 2)):
        with pytest.raises(RegardError, match=r"expected|has no attention"):
            to_wgqa(bad, 1)
    with pytest.raises(RegardError, match="has no attention layers"):
        convert_wgqa(torch.nn.Linear(2, 2), 1)
