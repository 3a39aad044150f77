"""WGQA: bad input, and a converted model that trains."""

import pytest
import torch

from regard import RegardError
from regard.lab.checks.shared.decoding import llama
from regard.nn import Attention
from regard.zoo.systems.wgqa import WeightedHeads, convert_wgqa, to_wgqa


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


@pytest.mark.parametrize("mode", ["scalar", "col", "row"])
@pytest.mark.parametrize("repeat", [False, True])
def test_what_is_made_by_hand(mode, repeat):
    linear = torch.nn.Linear(6, 8)  # four heads of two channels
    size = {"scalar": (4, 1, 1), "col": (4, 1, 2), "row": (4, 1, 6)}[mode]
    init, x = torch.randn(size), torch.randn(3, 6)
    made = WeightedHeads(linear, 4, 2, mode, init, repeat)
    parts = []
    for group in range(2):
        total = torch.zeros(3, 2)
        for head in (2 * group, 2 * group + 1):
            w, b = linear.weight[2 * head : 2 * head + 2], linear.bias[2 * head : 2 * head + 2]
            scale = init[head, 0]
            if mode == "row":  # of the inputs; a bias has none, and is averaged
                total = total + (x * scale) @ w.T + b / 2
            else:
                total = total + (x @ w.T + b) * scale
        parts += [total] * (2 if repeat else 1)
    assert torch.allclose(made(x), torch.cat(parts, 1), atol=1e-6)


def test_first_weights():
    linear = torch.nn.Linear(6, 8, dtype=torch.float64)
    assert bool((WeightedHeads(linear, 4, 2).mix == 0.5).all()) and bool((WeightedHeads(linear, 4, 1, init=3).mix == 3).all())
    drawn = [WeightedHeads(linear, 4, 2, "row", "random", generator=torch.Generator().manual_seed(seed)).mix for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0], torch.rand(4, 1, 6, generator=torch.Generator().manual_seed(0)).double())
    layers = [to_wgqa(Attention(16, 4), 2, "row", "random", torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(layers[0].k.mix, layers[1].k.mix) and not torch.equal(layers[0].k.mix, layers[0].v.mix)
    assert layers[0].kv_heads == 2 and not layers[0].k.repeat
    model = convert_wgqa(llama(heads=4, kv_heads=4), 2)
    assert model.config.num_key_value_heads == 2 == model.model.layers[0].self_attn.num_key_value_groups
