"""ACM: what it is made with is checked; sizes, first values and stages."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from regard import RegardError, adapt
from regard.lab.checks.shared.decoding import llama
from regard.nn.conditional import GumbelGate, spent
from regard.zoo.systems.acm import ACM, BudgetLoss, acmize, budgeted, choices, distilling, gate_labels, gating, width_for


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
