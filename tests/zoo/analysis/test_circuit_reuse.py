"""Circuits and repairs that there cannot be are refused."""

import pytest
import torch

import regard
from regard.interpret import circuit_overlap, repair
from regard.interpret.tables import HeadTable
from regard.zoo.analysis import circuit_reuse


def test_bad_input_is_refused():
    model = regard.nn.Decoder(vocab=30, dim=32, layers=2, heads=4).eval()
    with pytest.raises(regard.RegardError, match="rows holds"), repair(model, {(0, 0): torch.tensor([[99]] * 4)}):
        model(torch.randint(30, (4, 9)))
    with pytest.raises(regard.RegardError, match="no heads"):
        circuit_overlap([], [(0, 0)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_circuits_are_followed_backwards(monkeypatch):
    """Which heads are asked for at each level, with which options; key heads that several query heads share are asked for whole."""
    model = regard.nn.Decoder([regard.nn.Attention(32, 4, kv_heads=2) for _ in range(3)], vocab=30, dim=32, layers=3).eval()
    ids, seen, tables = torch.randint(30, (2, 5)), [], iter(range(100))

    def patch(given, clean, corrupt, metric, **options):
        seen.append(options)
        scores = torch.zeros(3, 4)
        if next(tables) == 0:
            scores[2, 1], scores[1, 0], scores[0, 3], scores[1, 2] = -0.5, 0.2, 0.1, 0.09
        else:
            scores[1, 3] = 0.4
        return HeadTable(scores)

    monkeypatch.setattr(circuit_reuse, "path_patch", patch)
    found = circuit_reuse.find_circuit(model, ids, ids, None, threshold=0.1, depth=3, position=2, freeze_mlp=True, components=("q", "k"))
    assert found.roles["logits"] == [(2, 1), (1, 0), (0, 3)] and list(found.roles) == [
        "logits",
        "q of logits",
        "k of logits",
        "q of q of logits",
        "k of q of logits",
        "q of k of logits",
        "k of k of logits",
    ]
    own = {"position": 2, "freeze_mlp": True}
    assert seen[0] == own and seen[1] == {**own, "receivers": [(2, 1), (1, 0)], "component": "q"}
    assert seen[2] == {**own, "receivers": [(1, 0), (1, 1), (2, 0), (2, 1)], "component": "k"}
    assert seen[3] == {**own, "receivers": [(1, 3)], "component": "q"} and seen[4]["receivers"] == [(1, 2), (1, 3)]
    assert found.heads == {(2, 1), (1, 0), (0, 3), (1, 3)} and len(found.columns()["role"]) == 3 + 6
    seen.clear()
    assert list(circuit_reuse.find_circuit(model, ids, ids, None, threshold=0.3).roles) == [
        "logits",
        "q of logits",
        "k of logits",
        "v of logits",
    ]
    assert seen[0] == {"position": -1, "freeze_mlp": False} and list(circuit_reuse.find_circuit(model, ids, ids, None, depth=1).roles) == [
        "logits"
    ]


def test_overlap_repair_and_attribution_by_hand():
    found = circuit_overlap([(0, 0), (0, 1), (1, 1)], [(0, 1), (2, 2)])
    assert (found.union, found.first, found.second) == (0.25, pytest.approx(1 / 3), 0.5)
    model, ids = regard.nn.Decoder(vocab=30, dim=32, layers=2, heads=4).eval(), torch.randint(30, (2, 6))
    with repair(model, {(1, 2): torch.tensor([[0, 3], [2, 2]])}, position=4), regard.taps(model, "weights") as seen:
        model(ids)
    assert seen["weights", 1][0, 2, 4].tolist() == [0.5, 0, 0, 0.5, 0, 0] and seen["weights", 1][1, 2, 4].tolist() == [0, 0, 1, 0, 0, 0]
    with regard.taps(model, ["weights", "heads"]) as plain:
        model(ids)
    assert torch.equal(seen["weights", 1][:, 2, 5], plain["weights", 1][:, 2, 5]) and torch.equal(
        seen["weights", 1][:, 1], plain["weights", 1][:, 1]
    )
    direction, scale = torch.randn(2, 32), torch.tensor([2.0, 5.0])
    for way, by in ((direction, direction), (direction[0], direction[:1].expand(2, -1))):
        for divided, size in ((1.0, torch.ones(2)), (scale, scale), (4.0, torch.full((2,), 4.0))):
            for position in (-1, 2):
                table = circuit_reuse.direct_attribution(model, plain, way, divided, position)
                for layer in range(2):
                    w = model.blocks[layer].mixer.out.weight.view(32, 4, 8)
                    out = torch.einsum("bhd,ehd->bhe", plain["heads", layer][:, :, position], w)
                    truth = (torch.einsum("bhe,be->bh", out, by) / size[:, None]).mean(0)
                    assert torch.allclose(table.scores[layer].float(), truth, atol=1e-5)
