"""Entanglement of matrices: half precision, bad input."""

import copy
import math

import pytest
import torch
from torch import nn

from regard import RegardError
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.artificial_entanglement import MPSAdapter, attention_entanglement, entanglement_profile, factors, no_hair, probe


def test_half_precision_and_batches():
    m = torch.randn(3, 8, 8)
    assert torch.allclose(entanglement_profile(m)[1], entanglement_profile(m[1])) and entanglement_profile(m).shape == (3, 5)
    assert (entanglement_profile(m.bfloat16()) - entanglement_profile(m)).abs().max() < 0.02


def test_bad_input():
    for bad, why in (
        (torch.zeros(4, 4), "all zeros"),
        (torch.full((2, 2), float("nan")), "finite"),
        (torch.ones(4), "finite numbers"),
        (torch.ones(2, 2).long(), "finite"),
    ):
        with pytest.raises(RegardError, match=why):
            entanglement_profile(bad)
    with pytest.raises(RegardError, match="multiply to 4 and 6"):
        entanglement_profile(torch.ones(4, 6), rows=[3])
    with pytest.raises(RegardError, match="B, H, Lq, Lk"):
        attention_entanglement(torch.ones(2, 2))
    for bad in ({"bond": 0}, {"bond": 2, "outs": [3, 2]}):
        with pytest.raises(RegardError, match="multiply to 8 and 12"):
            MPSAdapter(nn.Linear(12, 8), **bad)
    with pytest.raises(RegardError, match="at least one"):
        no_hair([], [], (torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)))


def test_two_ways_of_fine_tuning_compared():
    """Entropies known in closed form: a matrix with k equal singular values at its middle cut has log k."""
    two, four, one = torch.diag(torch.tensor([1.0, 1, 0, 0])), torch.eye(4), torch.ones(4, 4)
    maps = torch.stack([torch.stack([two, four])]), torch.stack([torch.stack([one, two])])  # (1, 2, 4, 4)
    found = no_hair([four, one], [one, one], maps)
    own = entanglement_profile(four)  # cuts of ones share nothing
    assert own[1] == pytest.approx(math.log(4)) and entanglement_profile(one).abs().max() < 1e-9
    assert found["internal"] == pytest.approx(float(own.mean()) / 2) and found["internal_scale"] == pytest.approx(float(own.mean()) / 4)
    assert found["external"] == pytest.approx(math.log(2)) and found["external_scale"] == pytest.approx(math.log(2))


def test_legs():
    assert [factors(n) for n in (1, 2, 9, 60, 97)] == [[1], [2], [3, 3], [2, 2, 3, 5], [97]]
    m = torch.randn(6, 4, dtype=torch.float64)
    assert torch.allclose(entanglement_profile(m, cols=[4])[1], entanglement_profile(m, rows=[6])[0])
    assert [tuple(c.shape) for c in MPSAdapter(nn.Linear(8, 3), 2).cores] == [(1, 1, 2, 2), (2, 1, 2, 2), (2, 3, 2, 1)]
    layer = MPSAdapter(nn.Linear(4, 6), 2, outs=[6], ins=[4])
    layer.cores[0].data.normal_()
    assert torch.allclose(layer.update(), layer.cores[0][0, :, :, 0]) and layer.alpha == 1


def test_the_probe_fine_tunes_three_ways_from_one_model():
    """One step of Adam by hand in full; ranks and bonds bound the others' middle cut; maps are those of the model with its update."""
    pytest.importorskip("peft")
    model = llama(layers=2)
    kept, seen = {name: p.clone() for name, p in model.named_parameters()}, []

    def draw(generator):
        seen.append(torch.randint(1, 50, (2, 12), generator=generator))
        return seen[-1]

    held = torch.randint(1, 50, (1, 8))
    found = probe(model, draw, held, steps=1, lr=1e-3, rank=2, bond=3)
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters()) and all(torch.equal(x, seen[0]) for x in seen)
    names = [f"model.layers.{at}.self_attn.{kind}_proj" for at in range(2) for kind in "qv"]
    own = copy.deepcopy(model)
    logits = own(seen[0]).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), seen[0][:, 1:].flatten())
    loss.backward()
    for way in ("lora", "full", "mps"):
        one = found[way]
        assert sorted(one.updates) == sorted(names) and one.losses[0] == pytest.approx(float(loss), rel=1e-5)
        for name in names:
            weight, dw = own.get_submodule(name).weight, one.updates[name]
            cuts = entanglement_profile(dw)
            middle = len(factors(weight.shape[0])) - 1
            if way == "full":
                assert torch.allclose(dw, -1e-3 * weight.grad / (weight.grad.abs() + 1e-8), atol=1e-8)
            if way == "lora":
                most = 1e-3 * 2 * weight.shape[1] ** -0.5  # B is a step of Adam, A at most 1 / sqrt(in): nothing scales their product
                assert 0.5 * most < dw.abs().max() <= most * 1.001
                assert torch.linalg.matrix_rank(dw, rtol=1e-6) <= 2 and cuts[middle] <= math.log(2) + 1e-6
            if way == "mps":
                first = 2 if name.endswith("q_proj") else 1  # of the rows' legs; columns begin with 2
                cut = dw.view(first, -1, 2, 16).transpose(1, 2).reshape(2 * first, -1)
                assert torch.linalg.matrix_rank(cut, rtol=1e-6) <= 3 and dw.abs().max() > 0
        tuned = copy.deepcopy(model)
        with torch.no_grad():
            for name in names:
                tuned.get_submodule(name).weight += one.updates[name]
            tuned.set_attn_implementation("eager")
            maps = torch.cat(tuned(held, output_attentions=True).attentions, 1)
        assert one.maps.shape == (1, 8, 8, 8) and torch.allclose(one.maps, maps, atol=1e-6)
    other = probe(model, draw, held, steps=8, lr=3e-3, targets=("q_proj",))
    assert len(other["mps"].losses) == 8 and set(other["full"].updates) == set(names[::2])
    a, b = other["lora"], other["full"]
    told = no_hair(list(a.updates.values()), list(b.updates.values()), (a.maps, b.maps))
    assert told["internal"] / told["internal_scale"] > told["external"] / told["external_scale"]  # the maps hardly tell them apart
    with pytest.raises(RegardError, match="targets"):
        probe(model, draw, held, targets=("nothing",))
