"""Abrupt learning in context beyond its checks: training by the paper's settings, plots, and what is refused."""

from __future__ import annotations

import pytest
import torch

from regard import RegardError
from regard.tasks.item_labels import ItemLabels, item_labels
from regard.zoo.analysis.abrupt_icl import (
    Emergence,
    InductionNet,
    abruptness,
    accuracy,
    emergence,
    nested_logits,
    progress,
)


def test_paper_s_settings_run():
    data = item_labels(64, generator=torch.Generator().manual_seed(0))
    assert data.width == 128 and data.noise == 0.1 and data.slots == 32
    found = emergence(data, steps=5, every=2, count=20)
    assert found.steps == [0, 2, 4, 5] and found["test"][0] <= 1 and found.plot().startswith("<svg")
    assert found.model.readout.out_features == 32 and len(found.model.mlp) == 3
    assert set(found.measures) == {"test", "novel", "flip", "weights", "previous", "copied", "target", "in_context"}


def test_one_seed_is_one_run_and_another_another():
    data = item_labels(8, 8, 6, torch.Generator().manual_seed(0), slots=2, novel=8)
    runs = [emergence(data, pairs=2, copies=1, steps=3, every=3, count=5, batch=4, seed=seed).model.readout.weight for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_what_does_not_fit_is_refused():
    data = item_labels(8, 8, 6, torch.Generator().manual_seed(0), slots=4, novel=8)
    draw = torch.Generator()
    for options in ({"pairs": 5}, {"pairs": 4, "copies": 3}, {"pairs": 0}, {"pairs": 4, "bursty": 1.5}, {"pairs": 4, "novel": -1}):
        with pytest.raises(RegardError, match="expected pairs"):
            data.draw(2, draw, **options)
    with pytest.raises(RegardError, match="multiple of the 8 labels"):
        item_labels(12, 8, 6)
    with pytest.raises(RegardError, match="novel=4"):
        item_labels(8, 8, 6, novel=4)
    with pytest.raises(RegardError, match="one width"):
        ItemLabels(torch.ones(8, 3), torch.ones(8, 4), novel=8)
    with pytest.raises(RegardError, match="as many labels"):
        item_labels(8, 2, 6, slots=8, novel=8).draw(2, draw, pairs=4, copies=1, distinct=True)
    with pytest.raises(RegardError, match="layers=0"):
        InductionNet(4, 2, layers=0)
    with pytest.raises(RegardError, match="more steps"):
        abruptness(nested_logits(steps=5))
    with pytest.raises(RegardError, match="depth=2"):
        nested_logits(depth=2)
    with pytest.raises(RegardError, match="every=0"):
        emergence(data, every=0)


def test_plateaus_and_cliffs_by_hand():
    losses = [2.0, 1.95, 1.8, 1.75, 0.9, 0.3, 0.2, 0.1]  # above 1.8 until step 2, at 0.2 from step 6
    assert abruptness(losses) == (6 - 2) / 2 and abruptness(losses, 0.5, 0.2) == (5 - 4) / 4 and abruptness([1.0, 0.05]) == 0.0
    with pytest.raises(RegardError, match=r"reach 0\.01"):
        abruptness(losses, low=0.01)
    found = Emergence(InductionNet(4, 2), [0, 10, 20, 30, 40], {"novel": [0.3, 0.4, 0.5, 0.7, 0.9], "test": [0.1, 0.3, 0.7, 0.7, 0.9]})
    assert (
        found.plateau() == 20
        and found.plateau("test") == 0
        and found.plateau("test", 0.2, 0.8) == 30
        and found.plateau(low=0.35, high=0.95) == 30
    )
    assert found.plateau(low=0.95) == -10 or found.plateau(low=0.95, high=0.99) == 0


def test_nested_logits_are_gradient_descent():
    """The model's gradients by autograd, three levels deep and one."""
    for depth in (1, 3):
        found = nested_logits(3, 5, lr=0.3, start=0.2, steps=6, depth=depth)
        logits, losses = torch.full((3,), 0.2, dtype=torch.float64), []
        for _ in range(6):
            b1, b2, xi = logits.requires_grad_().unbind()
            p1 = 1 / (1 + 5 * torch.exp(-b1))
            p2 = 1 / (1 + 5 * torch.exp(-b2 * p1)) if depth == 3 else torch.ones(())
            loss = torch.log1p(4 * torch.exp(-xi * p2))
            losses.append(float(loss))
            (slope,) = torch.autograd.grad(loss, logits)
            logits = (logits - 0.3 * slope).detach()
        assert found == pytest.approx(losses, rel=1e-9)


def test_first_weights_sizes_and_the_net_by_hand():
    torch.manual_seed(0)
    net = InductionNet(64, 5, 3, key_dim=40, hidden=(50, 30))
    for layer in net.modules():
        if isinstance(layer, torch.nn.Linear):
            assert abs(float(layer.weight.std()) * layer.in_features**0.5 - 1) < 0.15 and (layer.bias is None or not layer.bias.any())
    assert net.q[0].out_features == 40 and [one.out_features for one in net.mlp] == [50, 30] and len(net.q) == 3
    assert [one.out_features for one in InductionNet(7, 2).mlp] == [7] * 3 and len(InductionNet(7, 2).q) == 2
    net, x = InductionNet(6, 3, hidden=(4,)).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    tokens, maps = x, net.weights(x)
    for layer in range(2):
        s = (tokens @ net.q[layer].weight.T) @ (tokens @ net.k[layer].weight.T).mT
        p = s.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
        assert torch.allclose(maps[layer], p)
        tokens = tokens + p @ (tokens @ net.v[layer].weight.T)
    h = (tokens[:, -1] @ net.mlp[0].weight.T + net.mlp[0].bias).clamp_min(0)
    assert torch.allclose(net(x), h @ net.readout.weight.T + net.readout.bias)


def test_progress_by_hand():
    data = item_labels(8, 8, 6, torch.Generator().manual_seed(0), slots=3, novel=8)
    asked, net = data.draw(20, torch.Generator().manual_seed(1), pairs=3, copies=1), InductionNet(data.width, 8)
    maps, given, found = net.weights(asked.tokens), net(asked.tokens).argmax(1), progress(net, asked)
    previous, copied, target, inside = [], [], [], []
    for b in range(20):
        previous += [float(maps[0][b, 2 * n + 1, 2 * n]) for n in range(3)]
        labels = [float(maps[-1][b, -1, 2 * n + 1]) for n in range(3)]
        copied.append(sum(labels))
        target.append(sum(w for w, item in zip(labels, asked.items[b].tolist(), strict=True) if item == int(asked.item[b])))
        inside.append(int(given[b]) in asked.labels[b].tolist())
    truth = {"previous": previous, "copied": copied, "target": target, "in_context": inside}
    assert found == pytest.approx({name: sum(x) / len(x) for name, x in truth.items()}, abs=1e-6)
    assert accuracy(net, asked) == pytest.approx(float((given == asked.label).double().mean()))
