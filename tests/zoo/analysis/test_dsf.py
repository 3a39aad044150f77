"""The dynamical-systems framework beyond its checks: layers in models, half precision, recall, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from regard import RegardError
from regard.nn import QLSTM, Attention, Decoder, NormalizedAttention
from regard.tasks.synthetic import recall
from regard.zoo.analysis.dsf import (
    Recaller,
    System,
    from_linear_attention,
    from_s6,
    from_softmax_attention,
    from_ssd,
    monomials,
    recall_accuracy,
)


@pytest.mark.parametrize("make", [lambda: NormalizedAttention(16, 2, 8), lambda: QLSTM(16)])
def test_layers_mix_in_decoders_and_generate_step_by_step(make):
    model = Decoder([make(), make()], vocab=20, dim=16, layers=2).double().eval()
    ids = torch.randint(20, (2, 5))
    out = model.generate(ids, 6)
    for t in range(5, 11):
        assert torch.equal(model(out[:, :t])[:, -1].argmax(-1), out[:, t])
    half = make().bfloat16()
    assert half(torch.randn(1, 4, 16).bfloat16()).dtype == torch.bfloat16
    assert make()(torch.randn(1, 1, 16)).shape == (1, 1, 16)


def test_dropout_drops_weights_in_training_alone():
    layer, x = NormalizedAttention(8, 2, dropout=0.5), torch.randn(1, 6, 8)
    assert not torch.allclose(layer.train()(x), layer.eval()(x))
    assert torch.allclose(layer.eval()(x), layer.eval()(x))
    sums = torch.stack([layer.train()(x) for _ in range(4000)]).mean(0)
    assert torch.allclose(sums, layer.eval()(x), atol=0.05)


def test_gates_far_out_stay_numbers():
    layer = QLSTM(8)
    with torch.no_grad():
        layer.cell.gates.bias[:16] = 1e4  # forget all
        assert layer(torch.randn(1, 5, 8)).isfinite().all()


def test_recall_runs_are_one_by_seed():
    runs = [
        recall_accuracy(lambda: NormalizedAttention(8, key_dim=4), dim=8, length=8, pairs=1, vocab=8, steps=3, batch=4, seed=1)
        for _ in range(2)
    ]
    assert runs[0] == runs[1] and 0 <= runs[0] <= 1


def test_what_does_not_fit_is_refused():
    u = torch.randn(1, 3, 4)
    with pytest.raises(RegardError, match="write has shape"):
        System(u, torch.ones(1, 3, 2), torch.ones(1, 3, 4, 2), torch.ones(1, 3, 4, 2))
    for layer in (Attention(4, 2, "softmax", causal=False), Attention(4, 2, "softmax", kv_heads=1), Attention(4, 2, "gla")):
        with pytest.raises(RegardError, match="expected a causal"):
            from_softmax_attention(layer, u, 2)
    with pytest.raises(RegardError, match="order=-1"):
        from_softmax_attention(Attention(4, 2), u, -1)
    with pytest.raises(RegardError, match="eta="):
        from_linear_attention(Attention(4, 2), u, torch.exp, eta="mean")
    for options in ({"heads": 3}, {"key_dim": 3, "heads": 2}, {"norm": "softmax"}, {"dropout": 1.0}):
        with pytest.raises(RegardError, match="expected multiples"):
            NormalizedAttention(4, **options)
    for made in (NormalizedAttention(4), QLSTM(4)):
        with pytest.raises(RegardError, match="expected"):
            made(torch.randn(1, 3, 5))


def test_the_reader_of_recall_by_hand():
    torch.manual_seed(0)
    model = Recaller([torch.nn.Identity(), torch.nn.Linear(8, 8)], 8, 50, 40)
    assert all(abs(float(table.weight.std()) / 0.02 - 1) < 0.15 for table in (model.embed, model.place))
    x = model.embed.weight[torch.arange(7)] + model.place.weight[:7]
    for block in model.blocks:
        x = block(x)
        assert block.mlp.down.in_features == 32 or any(getattr(m, "in_features", 0) == 32 for m in block.mlp.modules())
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * model.norm.weight + model.norm.bias
    assert torch.allclose(model(torch.arange(7)[None])[0], x @ model.head.weight.T, atol=1e-6)


def test_forms_of_a_system_with_a_direct_path_by_loops():
    u, decay = torch.randn(2, 5, 3, dtype=torch.float64), torch.rand(2, 5, 4, dtype=torch.float64)
    write, read = torch.randn(2, 5, 4, 3, dtype=torch.float64), torch.randn(2, 5, 2, 4, dtype=torch.float64)
    for direct in (None, torch.randn(2, 5, 2, 3, dtype=torch.float64)):
        system = System(u, decay, write, read, direct)
        for b in range(2):
            h = torch.zeros(4, dtype=torch.float64)
            for t in range(5):
                h = decay[b, t] * h + write[b, t] @ u[b, t]
                y = read[b, t] @ h + (direct[b, t] @ u[b, t] if direct is not None else 0)
                for found in (system.recurrence(), system.scan(), system.explicit()):
                    assert torch.allclose(found[b, t], y)
        phi = system.phi()
        assert system.state == 4 and not torch.stack([phi[:, i, :, j] for i in range(5) for j in range(i + 1, 5)]).any()


def test_monomials_multiply_to_powers_of_inner_products():
    x, y = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    for order in range(5):
        truth = sum(float(x @ y) ** p / math.factorial(p) for p in range(order + 1))
        assert float(monomials(x, order) @ monomials(y, order)) == pytest.approx(truth) and len(monomials(x, order)) == math.comb(
            3 + order, order
        )


def test_linear_attention_with_two_features_by_loops():
    layer, u = Attention(4, 2, bias=True).double(), torch.randn(1, 5, 4, dtype=torch.float64)
    phi, psi = (lambda x: x.exp()), (lambda x: x.square() + 1)
    q, k, v = (one(u)[0].unflatten(-1, (2, 2)) for one in (layer.q, layer.k, layer.v))
    for eta in ("sum", "one"):
        system, rows = from_linear_attention(layer, u, phi, psi, eta), []
        for i in range(5):
            heads = []
            for h in range(2):
                w = torch.stack([phi(q[i, h]) @ psi(k[j, h]) for j in range(i + 1)])
                heads.append((w / w.sum() if eta == "sum" else w) @ v[: i + 1, h])
            rows.append(layer.out(torch.cat(heads)))
        assert torch.allclose(system.recurrence()[0], torch.stack(rows)) and torch.allclose(system.explicit()[0], torch.stack(rows))
    same = from_linear_attention(layer, u, phi).recurrence()
    assert torch.allclose(same, from_linear_attention(layer, u, phi, phi, "sum").recurrence())


def test_recall_runs_follow_their_recipe():
    """Answers alone are learnt and counted, on 500 sequences of another seed, in evaluation."""
    sizes = {"dim": 8, "layers": 3, "length": 8, "pairs": 2, "vocab": 8, "steps": 4, "batch": 6, "lr": 0.1, "seed": 3}

    def mixer():
        return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.2))

    found = recall_accuracy(mixer, **sizes)
    torch.manual_seed(3)
    model, generator = Recaller([mixer() for _ in range(3)], 8, 8, 8), torch.Generator().manual_seed(3)
    optimiser = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(4):
        tokens, labels = recall(6, 8, 2, 8, generator)
        asked = labels != -100
        loss = -model(tokens)[asked].log_softmax(-1)[torch.arange(int(asked.sum())), labels[asked]].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    tokens, labels = recall(500, 8, 2, 8, torch.Generator().manual_seed(4))
    asked = labels != -100
    with torch.no_grad():
        answers = model.eval()(tokens).argmax(-1)
    assert found == pytest.approx(float((answers[asked] == labels[asked]).double().mean()), abs=2e-3) and found > 0


def test_systems_stand_where_their_inputs_do():
    def empty(*shape):
        return torch.empty(*shape, device="meta")

    s6 = from_s6(empty(2, 3, 7), empty(2, 3, 7), empty(3, 4), empty(2, 4, 7), empty(2, 4, 7), empty(3))
    ssd = from_ssd(empty(2, 2, 7, 3), empty(2, 2, 7), empty(2, 2, 7, 5), empty(2, 2, 7, 5))
    for system, shape in ((s6, (2, 7, 3)), (ssd, (2, 7, 6))):
        y = system.recurrence()
        assert y.is_meta and y.shape == shape
