"""What the checks of rollout-and-flow do not hold: bad input, one example, padding."""

import pytest
import torch

import regard
from regard.interpret import flow, input_gradients, rank_correlation, rollout
from regard.zoo.analysis.rollout_and_flow import blank_out, ranks

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


def test_ranks_and_their_correlation_by_hand():
    x = torch.tensor([[3.0, 1, 1, 7, 3, 3]])
    assert ranks(x).tolist() == [[3, 0.5, 0.5, 5, 3, 3]]
    scipy = pytest.importorskip("scipy.stats")
    a, b = torch.randn(4, 9), torch.randint(0, 3, (4, 9)).float()
    found = rank_correlation(a, b)
    assert found.tolist() == pytest.approx([scipy.spearmanr(p.numpy(), q.numpy()).statistic for p, q in zip(a, b, strict=True)])
    assert rank_correlation(a[:1], torch.ones(1, 9)).tolist() == [0.0]


def test_options_of_maps_by_hand():
    """Fuses, discarded weights and the residual stream, for both."""
    a = torch.rand(2, 2, 3, 4, 4, dtype=torch.float64)
    for fuse, by in (("mean", a.mean(2)), ("max", a.amax(2)), ("min", a.amin(2)), ("sum", a.sum(2))):
        for residual in (True, False):
            rows = []
            for w in by:
                w = w + torch.eye(4) if residual else w
                rows.append(w / w.sum(-1, keepdim=True) if residual else w)
            every = rollout(list(a), residual=residual, head_fuse=fuse, every_layer=True)
            assert torch.allclose(every, torch.stack((rows[0], rows[1] @ rows[0]), 1))
            assert torch.equal(rollout(list(a), residual=residual, head_fuse=fuse), every[:, -1])
    w = a[0].mean(1)
    kept = w.clone().flatten(1)
    for b in range(2):
        for at in kept[b].argsort()[:8].tolist():
            kept[b, at] = kept[b, at] if at == 0 else 0.0
    assert torch.allclose(rollout([a[0]], residual=False, discard_ratio=0.5), kept.view(2, 4, 4))
    pytest.importorskip("networkx")
    one = flow([a[0]], residual=False, discard_ratio=0.5, normalise=False)
    assert torch.allclose(one, kept.view(2, 4, 4)) and torch.allclose(flow([a[0]], queries=[2]), flow([a[0]])[:, 2:3])
    assert torch.allclose(flow(list(a)).sum(-1), torch.ones(2, 4).double()) and flow(list(a), every_layer=True).shape == (2, 2, 4, 4)
    assert torch.allclose(flow(list(a), every_layer=True)[:, 0], flow([a[0]])) and torch.allclose(
        flow(list(a), head_fuse="max"), flow([x.amax(1, True) for x in a])
    )


def test_blanked_tokens_one_by_one():
    table = torch.randn(9)
    ids = torch.randint(1, 9, (3, 5))
    found = blank_out(lambda x: table[x].sum(1), ids, 0)
    assert torch.allclose(found, table[ids] - table[0], atol=1e-6)
