"""Masks of heads by chance and what they refuse."""

import pytest
import torch

import regard
from regard.interpret import HeadMask, inequality
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
