"""Masks of heads by chance and what they refuse."""

import pytest
import torch

import regard
from regard.interpret import HeadMask, inequality
from regard.interpret.heads import gated
from regard.interpret.tables import HeadTable


def test_head_masks_refuse_what_they_cannot_do():
    model, ids = regard.nn.Decoder(vocab=9, dim=16, layers=2, heads=4).train(), torch.randint(9, (2, 5))
    for options, message in (
        ({"n": 4}, "n=4"),
        ({"n": 1, "mode": "all"}, "mode"),
        ({"n": 1, "where": [2]}, "where"),
        ({"n": 1, "where": []}, "where"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            HeadMask(model, **options)
    with HeadMask(model, 1) as mask:
        with pytest.raises(regard.RegardError, match=r"draw\(\)"):
            model(ids)
        with pytest.raises(regard.RegardError, match=r"expected draw\(\)"):
            mask.rank(lambda: model(ids).sum())
        mask.draw()
        model(ids).sum().backward()
        assert all(block.mixer.out.weight.grad.view(16, 4, 4)[:, mask.masks[at]].eq(0).all() for at, block in enumerate(model.blocks))
    with HeadMask(model, 2, where=[1]) as mask, regard.taps(model, "heads") as seen:
        mask.draw()
        model(ids)
    assert seen["heads", 0].any(-1).any(-1).all() and int((~seen["heads", 1].any(-1).any(-1))[0].sum()) == 2
    for table in (torch.zeros(1, 2), torch.tensor([[-1.0, 2.0]])):
        with pytest.raises(regard.RegardError, match="importance"):
            inequality(HeadTable(table))
    with pytest.raises(regard.RegardError, match="go together"):
        inequality(HeadTable(torch.ones(1, 2)), HeadTable(torch.ones(1, 2)))


def test_masks_are_drawn_anew_by_their_seed_and_the_others_grow():
    model, ids = regard.nn.Decoder(vocab=9, dim=16, layers=2, heads=4), torch.randint(9, (2, 5))
    drawn = []
    for seed in (0, 0, 1):
        mask = HeadMask(model, 2, seed=seed)
        for _ in range(6):
            mask.draw()
            assert all(int(own.sum()) == 2 for own in mask.masks.values())
            drawn.append(tuple(tuple(own.tolist()) for own in mask.masks.values()))
    assert drawn[:6] == drawn[6:12] != drawn[12:] and len(set(drawn[:6])) > 2
    with regard.taps(model, "heads") as seen:
        model(ids)
    plain = seen["heads", 0]
    for rescale in (False, True):
        with HeadMask(model, 1, rescale=rescale) as mask:
            mask.draw()
            with regard.taps(model, "heads") as seen:
                model.train()(ids)
            kept = ~mask.masks[0]
            assert torch.allclose(seen["heads", 0][:, kept], plain[:, kept] * (4 / 3 if rescale else 1), atol=1e-6)
            assert not seen["heads", 0][:, ~kept].any()
            with regard.taps(model.eval(), "heads") as seen:
                model(ids)
            assert torch.equal(seen["heads", 0], plain)


def test_the_most_important_heads_are_silent():
    model, ids = regard.nn.Decoder(vocab=9, dim=16, layers=2, heads=4), torch.randint(9, (2, 5))

    def loss():
        return model(ids).square().sum()

    gates = {at: torch.ones(4, requires_grad=True) for at in range(2)}
    with gated(model, gates):
        slopes = torch.autograd.grad(loss(), list(gates.values()))
    with HeadMask(model.train(), 2, "impt") as mask:
        mask.rank(loss)
        for at, slope in enumerate(slopes):
            assert set(mask.masks[at].nonzero()[:, 0].tolist()) == set(slope.abs().topk(2).indices.tolist())
        assert all(p.grad is None for p in model.parameters())
        with pytest.raises(regard.RegardError, match=r"expected rank\(loss\)"):
            mask.draw()


def test_inequality_by_hand():
    scores = torch.tensor([[1.0, 2.0], [5.0, float("nan")]])
    found = inequality(HeadTable(scores))
    gini = sum(abs(a - b) for a in (1, 2, 5) for b in (1, 2, 5)) / (2 * 9 * (8 / 3))
    assert found.gini == pytest.approx(gini) and found.worst is None
    assert found.spread == pytest.approx(float(torch.tensor([1.0, 2, 5]).std(correction=0)) / (8 / 3))
    assert inequality(HeadTable(scores), HeadTable(torch.tensor([[0.7, 0.4], [0.9, float("nan")]])), 0.95).worst == pytest.approx(0.55)
