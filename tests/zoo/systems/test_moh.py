"""MoH: gradients straight through gates, queries of zero, bad input."""

import pytest
import torch

from regard import RegardError
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.moh import MoHAttention, convert_moh


def test_learning_goes_straight_through_gates():
    model, ids = llama(heads=4, kv_heads=4), torch.randint(1, 50, (1, 4))
    with convert_moh(model) as routing:
        model(ids, use_cache=False)
        gates = routing.gates[0]
        assert set(gates.detach().unique().tolist()) == {0.0, 1.0}
        q = model.model.layers[0].self_attn.q_proj(model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)))
        size = q.unflatten(-1, (4, 8))[..., 2:, :].norm(dim=-1)
        p = (size / size.std(-1, keepdim=True)).softmax(-1)
        seed = torch.randn_like(p)
        weight = model.model.layers[0].self_attn.q_proj.weight
        a, b = (torch.autograd.grad((x * seed).sum(), weight, retain_graph=True)[0] for x in (gates[..., 2:], p))
        assert torch.allclose(a, b, atol=1e-10) and b.abs().max() > 0


def test_a_token_without_a_query_is_no_nan():
    model = llama()
    model.model.embed_tokens.weight.data[0] = 0
    with convert_moh(model):
        assert model(torch.zeros(1, 3, dtype=torch.long), use_cache=False).logits.isfinite().all()


def test_generation_with_a_cache():
    model, ids = llama(), torch.randint(1, 50, (1, 5))
    with convert_moh(model):
        out = model.generate(ids, max_new_tokens=5, do_sample=False)
        for t in range(5, 10):
            assert model(out[:, :t], use_cache=False).logits[0, -1].argmax() == out[0, t]


def test_bad_input():
    for bad in ({"routed": 0}, {"shared": 3, "routed": 2}, {"shared": 5}, {"dim": 10}):
        with pytest.raises(RegardError, match="shared \\+ routed <= heads"):
            MoHAttention(**{"dim": 8, "heads": 4, "shared": 2, "routed": 1, **bad})
    for bad in ({"routed": 0.1}, {"shared": 0.75, "routed": 0.5}, {"shared": 0.9}):
        with pytest.raises(RegardError, match="at least one routed"):
            convert_moh(llama(), **bad)
    with pytest.raises(RegardError, match="q_proj and o_proj"):
        convert_moh(torch.nn.Linear(2, 2))
