"""What the checks of rollout-and-flow do not hold: bad input, one example, padding."""

import pytest
import torch

import regard
from regard.interpret import flow, input_gradients, rank_correlation, rollout

MAPS = torch.rand(2, 1, 2, 5, 5).softmax(-1)


def test_bad_input_is_refused():
    wrong = [
        ((MAPS[:, :, 0],), {}, "attentions holds"),
        (([MAPS[0], MAPS[0][..., :4, :4]],), {}, "attentions holds"),
        ((-MAPS,), {}, "negative"),
        (([],), {}, "empty"),
        ((MAPS,), {"head_fuse": "median"}, "head_fuse"),
        ((MAPS,), {"discard_ratio": 1.0}, "discard_ratio"),
    ]
    for args, options, message in wrong:
        for function in (rollout, flow):
            with pytest.raises(regard.RegardError, match=message):
                function(*args, **options)
    with pytest.raises(regard.RegardError, match="queries"):
        flow(MAPS, queries=[5])
    with pytest.raises(regard.RegardError, match="kind"):
        input_gradients(lambda x: x.sum((1, 2)), torch.randn(1, 2, 3), "sum")
    with pytest.raises(regard.RegardError, match="one shape"):
        rank_correlation(torch.rand(1, 3), torch.rand(1, 4))


def test_a_row_that_sees_nothing_keeps_itself():
    maps = MAPS.clone()
    maps[..., 0, :] = 0  # a padded query
    maps[..., :, 0] = 0
    assert torch.equal(rollout(maps)[0, 0], torch.eye(5)[0]) and torch.equal(flow(maps)[0, 0].float(), torch.eye(5)[0])
    assert bool(rollout(maps, residual=False).isfinite().all()) and bool(flow(maps, residual=False).isfinite().all())
    assert float(rank_correlation(torch.ones(1, 3), torch.rand(1, 3))) == 0


def test_gradients_by_length_and_by_product():
    x, w = torch.randn(2, 3, 4), torch.randn(4)
    torch.testing.assert_close(input_gradients(lambda z: (z @ w).sum(-1), x, "norm"), w.norm().expand(2, 3))
    torch.testing.assert_close(input_gradients(lambda z: (z @ w).sum(-1), x), (x @ w).abs())
