"""MoH: gradients straight through gates, queries of zero, bad input."""

import pytest
import torch

from regard import RegardError
from regard.engine.meter import pairs_read
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


def test_gates_by_hand():
    """Shared heads alone, routed heads alone, and both, with the balance loss."""
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for shared, routed in ((2, 1), (1, 2), (0, 2), (4, 0)):
        layer = MoHAttention(8, 4, shared, routed).double()
        found, rows = layer.gates(x), []
        for b in range(2):
            for t in range(5):
                own = shared * (layer.share.weight @ x[b, t]).softmax(0) if shared > 1 else torch.ones(shared).double()
                if not routed:
                    rows.append(own)
                    continue
                s = (layer.route.weight @ x[b, t]).softmax(0)
                kept = torch.zeros_like(s).index_fill(0, s.topk(routed).indices, 1.0) * s
                kept = routed * kept / kept.sum()
                a = 2 * (layer.weigh.weight @ x[b, t]).softmax(0) if shared else torch.ones(2).double()
                rows.append(torch.cat((a[0] * own, a[1] * kept)))
        assert torch.allclose(found, torch.stack(rows).view(2, 5, 4))
        if routed:
            s = (x @ layer.route.weight.T).softmax(-1).flatten(0, 1)
            taken = torch.zeros_like(s).scatter(1, s.topk(routed).indices, 1.0)
            count = 4 - shared
            assert float(layer.aux_loss) == pytest.approx(
                float(sum(count**2 * taken[:, i].mean() * s[:, i].mean() for i in range(count)) / count)
            )
        else:
            assert float(layer.aux_loss) == 0


def test_sizes_and_norms():
    layer = MoHAttention(6, 4, 1, 1, head_dim=5, qkv_bias=True, bias=False, qk_norm=True)
    assert layer.qkv.out_features == 60 and layer.out.in_features == 20 and layer.qkv.bias is not None and layer.out.bias is None
    assert isinstance(layer.q_norm, torch.nn.LayerNorm) and layer.k_norm.eps == 1e-5 and layer(torch.randn(1, 3, 6)).shape == (1, 3, 6)
    plain = MoHAttention(8, 4)
    assert (
        plain.qkv.bias is None and plain.out.bias is not None and isinstance(plain.q_norm, torch.nn.Identity) and plain.share.bias is None
    )
    assert plain.route.bias is None and plain.weigh.bias is None and plain.route.out_features == 2


def test_the_share_of_heads_is_rounded_down():
    model, ids = llama(heads=4, kv_heads=4), torch.randint(1, 50, (1, 4))
    for shared, routed, s, k in ((0.5, 0.25, 2, 1), (0.3, 0.6, 1, 2), (0.0, 0.25, 0, 1)):
        with convert_moh(model, shared, routed) as routing:
            model(ids, use_cache=False)
            gates = [routing.gates[at].detach() for at in range(2)]
            assert all(bool((one[..., :s] == 1).all()) and bool((one[..., s:].sum(-1).round(decimals=6) == k).all()) for one in gates)
            assert float(routing.aux_loss) == pytest.approx(float(sum(routing.losses.values()) / 2))
    assert not model.model.layers[0].self_attn.q_proj._forward_hooks


def test_pairs_that_the_skipping_path_reads():
    """Every token of a head reads all keys, or those up to its own."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 12)
    for causal in (False, True):
        layer = MoHAttention(12, 4, shared=0, routed=2, skip=True, causal=causal).eval()
        taken = (layer.gates(x) != 0).sum(-1)
        with pairs_read() as read:
            layer(x)
        assert read.read == sum(int(taken[b, t]) * (t + 1 if causal else 7) for b in range(2) for t in range(7))
        with pairs_read() as read:  # in training nothing is skipped
            layer.train()(x)
        assert read.read != sum(int(taken[b, t]) * (t + 1 if causal else 7) for b in range(2) for t in range(7))


def test_dropout_in_training_alone():
    torch.manual_seed(0)
    x = torch.randn(1, 6, 8)
    for options in ({"attn_drop": 0.5}, {"proj_drop": 0.5}):
        layer = MoHAttention(8, 4, **options)
        assert not torch.equal(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))
    layer = MoHAttention(8, 4, proj_drop=0.5)
    whole = layer.eval()(x)
    times = (layer.train()(x) / whole).round(decimals=4)
    assert set(times.flatten().tolist()) == {0.0, 2.0}


def test_a_model_that_is_refused_keeps_no_hooks():
    model = llama()
    model.model.layers[1].self_attn.head_dim = 32  # one head: none to choose from
    with pytest.raises(RegardError, match="of 1 heads"):
        convert_moh(model)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
