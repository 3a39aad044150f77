"""ACM: what it is made with is checked; sizes, first values and stages."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from regard import RegardError, adapt
from regard.lab.checks.shared.decoding import llama
from regard.nn.conditional import GumbelGate, spent
from regard.zoo.systems.acm import (
    ACM,
    BudgetLoss,
    GateLoss,
    acmize,
    budgeted,
    choices,
    distilled,
    distilling,
    gate_labels,
    gating,
    width_for,
)


def draw(generator):
    return torch.randint(1, 50, (2, 10), generator=generator)


def test_bad_values_are_refused():
    for options in (
        {"act": "x"},
        {"bias": "x"},
        {"learners": 0},
        {"block": 0},
        {"tau": 0.0},
        {"least": 9},
        {"gate_depth": 0},
        {"gate_act": "x"},
    ):
        with pytest.raises(RegardError, match="expected"):
            ACM(8, **options)
    for options in ({"kinds": ("x",)}, {"kinds": ()}, {"share": 0.0}, {"layers": [7]}):
        with pytest.raises(RegardError, match="expected"):
            acmize(llama(), **options)
    for options in ({"beta": 1.5}, {"beta": 0.5, "kind": "x"}):
        with pytest.raises(RegardError, match="BudgetLoss"):
            BudgetLoss(**options)
    with pytest.raises(RegardError, match="have been called"):
        choices(nn.ModuleList([ACM(8)]))


def test_first_values_lie_where_the_released_ones_do():
    layer = ACM(16, 4, 9)
    for p, bound in ((layer.w1, (4 * 9) ** -0.5), (layer.w2, 16**-0.5), (layer.b1, 9**-0.5), (layer.b2, 16**-0.5)):
        assert 0.8 * bound < float(p.abs().max()) <= bound
    assert [tuple(one.weight.shape) for one in layer.gate.layers] == [(128, 16), (5, 128)]


def test_sizes_follow_the_dense_layers():
    assert width_for(0.25, 768, 768) == round(0.25 * (768**2 + 768) / (2 * 768 + 1))
    model = llama()
    conversion = acmize(model, ("ffn", "k", "o"), layers=[1], learners=3)
    found = {name.rpartition(".")[2]: part for name, part in conversion.students.items()}
    assert set(found) == {"mlp", "k_proj", "o_proj"} and found["k_proj"].out == 16 and found["k_proj"].act == "identity"
    assert found["mlp"].block == 16 and found["mlp"].b1 is None
    ids = torch.randint(50, (2, 6))
    assert model(ids).logits.isfinite().all()
    conversion.restore()
    assert not [part for part in model.modules() if isinstance(part, ACM)]


def test_stages_teach_what_they_say():
    torch.manual_seed(0)
    model = llama()
    conversion = acmize(model, ("ffn",), learners=3)
    before = copy.deepcopy(model.state_dict())

    def moved():
        return {
            name.rpartition("mlp.")[2].split(".")[0]
            for name, p in model.named_parameters()
            if not torch.equal(p, before[name]) and "mlp" in name
        }

    adapt.carry_out(conversion, [distilling(2)], draw)
    assert moved() == {"w1", "w2"}
    adapt.carry_out(conversion, [gating(2, released=True)], draw)
    assert moved() == {"w1", "w2", "gate"}
    first = next(iter(conversion.students.values()))
    first.straight = False  # as released, the task's own loss reaches no gate
    for p in model.parameters():
        p.requires_grad_(True)
    adapt.carry_out(conversion, [budgeted(1, 0.5, loss={"weight": 0.0, "entropy": 0.0, "diversity": 0.0})], draw)
    assert first.choice is not None


def test_gates():
    gate = GumbelGate(4, 5, least=2).eval()
    x = torch.randn(50, 4)
    assert gate(x).shape == (50, 5) and not gate(x)[:, :2].any() and torch.equal(gate(x).sum(-1), torch.ones(50))
    drawn = gate.train()(x)
    assert torch.allclose(drawn.sum(-1), torch.ones(50)) and drawn.requires_grad and gate.flops == 2 * (4 * 128 + 128 * 3)
    assert torch.equal(gate_labels(torch.tensor([[4.0, 2.0, 1.9, 1.0]]), 1.2), torch.tensor([2]))
    assert torch.equal(gate_labels(torch.tensor([[1.0, 1.0, 0.5]]), 1.2), torch.tensor([1]))
    assert torch.equal(gate_labels(torch.tensor([[1.0, 1.0, 0.5]]), 1.2, released=True), torch.tensor([2]))
    all_of_one = torch.nn.functional.one_hot(torch.tensor([[2, 2]]), 3).float()
    none = torch.nn.functional.one_hot(torch.tensor([[0, 0]]), 3).float()
    assert float(spent([all_of_one, none], [3, 1])) == 0.75


def test_as_released_the_task_s_loss_reaches_no_gate():
    torch.manual_seed(0)
    for straight in (True, False):
        layer = ACM(6, 3, 5, straight=straight)
        layer(torch.randn(2, 30, 6)).square().sum().backward()
        assert (layer.gate.layers[0].weight.grad is not None) == straight


def test_losses_of_the_stages_by_hand():
    layer = ACM(6, 3, 5, least=1, out=4).double()
    x, y = torch.randn(2, 7, 6, dtype=torch.float64), torch.randn(2, 7, 4, dtype=torch.float64)
    h = layer.outputs(x).detach()
    squared = sum((h[:, :, n] - y).square().mean() for n in range(4)) / 4
    for lesson in (((x,), {}, y), ((), {"hidden_states": x}, (y, None))):
        assert torch.allclose(distilled(layer, lesson), squared)
        for options, factor in (({}, 1.2), ({"factor": 1.01, "released": True}, 1.01)):
            total = []
            logits = layer.gate.logits(x)
            for b in range(2):
                for t in range(7):
                    errors = [float((h[b, t, n] - y[b, t]).square().sum().sqrt()) for n in range(4)]
                    enough = [n for n in range(1, 4) if errors[n - 1] / errors[n] < factor]
                    label = enough[0] if enough and not (options.get("released") and enough[0] == 1) else 3
                    total.append(-logits[b, t].log_softmax(0)[max(label - 1, 0)])
            assert torch.allclose(GateLoss(**options)(layer, lesson), sum(total) / 14)
    model = llama()
    acmize(model, ("ffn",), learners=2)
    ids, loss = torch.randint(1, 50, (2, 6)), BudgetLoss(0.4, kind="l2")
    model.eval()
    found = loss(model, ids)
    task = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(found, task + loss.terms(model)) and found.dtype == torch.float64
    assert float(BudgetLoss(0.4, task=lambda model, batch: torch.zeros(()).double())(model, ids)) == pytest.approx(
        float(loss.terms(model) * 0 + BudgetLoss(0.4).terms(model))
    )


def test_how_many_learners_run_without_a_gate():
    layer, x = ACM(6, 3, 5).double().eval(), torch.randn(2, 4, 6, dtype=torch.float64)
    for n in range(4):
        layer.fixed = n
        assert torch.allclose(layer(x), layer.outputs(x)[:, :, n]) and bool((layer.choice.argmax(-1) == n).all())
        assert torch.allclose(layer.few(x, torch.full((2, 4), n)), layer.outputs(x)[:, :, n])
