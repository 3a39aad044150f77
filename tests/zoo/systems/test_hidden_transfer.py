"""Hidden transfer: eager attention, bad input, and a model left as it was."""

import itertools
import math

import pytest
import torch

from regard import RegardError
from regard.generate import generate
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.hidden_transfer import HiddenTransfer

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_batches_with_padding_and_nothing_left_behind(implementation):
    model = llama(layers=3).float()
    model.set_attn_implementation(implementation)
    ids, mask = torch.tensor([[3, 4, 5], [0, 0, 7]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    truth = model.generate(ids, attention_mask=mask, max_new_tokens=25, do_sample=False)
    assert torch.equal(generate(model, ids, HiddenTransfer(model, [1, 1, 2]), attention_mask=mask, max_new_tokens=25).tokens, truth)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


def test_bad_input():
    model = llama(layers=3)
    for bad in ([], [0], [3], [2, 1]):
        with pytest.raises(RegardError, match="expected numbers from 1 to 2"):
            HiddenTransfer(model, bad)
    with pytest.raises(RegardError, match="at most 1, a level a layer"):
        HiddenTransfer(model, [1], tree=[[0], [0, 0]])
    config = transformers.OPTConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=16, word_embed_proj_dim=16
    )
    with pytest.raises(RegardError, match="no rotary positions"):
        HiddenTransfer(transformers.OPTForCausalLM(config).eval(), [1])


def test_maps_and_tree_by_default_and_otherwise():
    model = llama(layers=4)
    draft = HiddenTransfer(model, [1, 2, 2])
    assert all(torch.equal(one.weight, torch.eye(32).double()) and not one.bias.any() for one in draft.maps)
    paths = set(map(tuple, draft.shape.paths))
    truth = {p for n in (1, 2, 3) for p in itertools.product(range(6), repeat=n) if math.prod(r + 1 for r in p) <= 6}
    assert paths == truth
    bare = HiddenTransfer(model, [1], bias=False, identity=False)
    assert bare.maps[0].bias is None and not torch.equal(bare.maps[0].weight, torch.eye(32).double())
    drawn = HiddenTransfer(model, [1], identity=False).maps[0]
    assert float(drawn.weight.abs().max()) <= 32**-0.5 and bool(drawn.bias.any())
    assert HiddenTransfer(model, [1, 2], tree=[[0], [1], [0, 0]]).shape.paths and HiddenTransfer(model, [1]).layers == (1,)
