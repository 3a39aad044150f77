"""LRAgent: bad input, and the model as it was."""

import pytest
import torch

from regard import RegardError
from regard.lab.checks.shared.decoding import llama
from regard.lab.checks.systems.lragent import adapters, counting
from regard.zoo.systems.lragent import MultiLoRACache, lora_attention, train_roles


def test_the_model_comes_back_after_turns_training_and_errors():
    model, ids = llama(), torch.randint(1, 50, (2, 9))
    before, learned = model(ids, use_cache=False).logits, [p.requires_grad for p in model.parameters()]
    cache = MultiLoRACache(model, adapters(model), "base")
    cache.extend("agent 0", ids)
    cache.extend("agent 1", ids[:, :2])
    train_roles(model, {"one": counting(1)}, rank=2, steps=2)
    with pytest.raises(IndexError):
        MultiLoRACache(model, adapters(model)).extend("agent 0", ids + 1000)
    assert torch.equal(model(ids, use_cache=False).logits, before)
    assert [p.requires_grad for p in model.parameters()] == learned and "forward" not in vars(model.model.layers[0].self_attn.k_proj)


def test_bad_input():
    model, ids = llama(), torch.randint(1, 50, (2, 9))
    both = adapters(model)
    both["agent 1"].a_v = [x + 1 for x in both["agent 1"].a_v]
    with pytest.raises(RegardError, match="a_v or a scale of its own"):
        MultiLoRACache(model, both)
    cache = MultiLoRACache(model, both, "base")
    with pytest.raises(RegardError, match="one of agent 0, agent 1"):
        cache.extend("agent 2", ids)
    cache.extend("agent 0", ids)
    for wrong in (ids[:1], ids[:, :0], ids[0]):
        with pytest.raises(RegardError, match="with the batch of the trajectory"):
            cache.extend("agent 0", wrong)
    with pytest.raises(RegardError, match="share='all'"):
        MultiLoRACache(model, both, "all")
    with pytest.raises(RegardError, match="2 tensors each"):
        MultiLoRACache(llama(layers=2), adapters(llama(layers=3)))
    q, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    with pytest.raises(RegardError, match=r"\(Hkv, r, Dv\)"):
        lora_attention(q, v, v, torch.randn(2, 9, 3), torch.randn(4, 3, 8))
    with pytest.raises(RegardError, match="q_proj, k_proj and v_proj"):
        MultiLoRACache(torch.nn.Linear(2, 2), both)
