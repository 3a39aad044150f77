"""Fields, baselines and options of token pooling, against loops."""

import pytest
import torch
from layers import vit

from regard.zoo.vision.token_pooling import METHODS, PooledViT, clustering_loss, softmax_as_gaussian_filter, token_pool


@pytest.mark.parametrize("method", METHODS)
def test_fields_name_the_nearest_centre_and_the_nearest_token(method):
    torch.manual_seed(0)
    x, w = torch.randn(2, 11, 3, dtype=torch.float64), torch.rand(2, 11, dtype=torch.float64)
    found = token_pool(x, 4, w, method)
    assert found.tokens.shape == (2, 4, 3) and found.assign.shape == (2, 11) and found.centres.shape == (2, 4)
    for b in range(2):
        for k in range(4):
            near = min(range(11), key=lambda n: float((x[b, n] - found.tokens[b, k]).norm()))
            assert int(found.centres[b, k]) == near
            if method not in ("kmeans", "grid"):
                assert torch.equal(x[b, near], found.tokens[b, k])
        if method != "grid":
            assert found.assign[b].tolist() == [min(range(4), key=lambda k: float((y - found.tokens[b, k]).norm())) for y in x[b]]


def test_stretches_of_the_grid():
    x = torch.randn(2, 11, 3, dtype=torch.float64)
    found = token_pool(x, 4, method="grid")
    stretches = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    assert found.assign.tolist() == [[0] * 3 + [1] * 3 + [2] * 3 + [3] * 2] * 2
    torch.testing.assert_close(found.tokens, torch.stack([x[:, at].mean(1) for at in stretches], 1))


def test_random_tokens_come_by_their_weights():
    torch.manual_seed(0)
    w = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.0]]).expand(4000, -1)
    x = torch.arange(5.0).reshape(1, 5, 1).expand(4000, -1, -1)
    first = token_pool(x, 1, w, "random").centres[:, 0]
    share = torch.bincount(first, minlength=5) / 4000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0]), atol=0.03, rtol=0)
    even = torch.bincount(token_pool(x, 1, method="random").centres[:, 0], minlength=5) / 4000
    assert float((even - 0.2).abs().max()) < 0.03


def test_loss_of_centres_with_weights_and_without():
    x, c, w = torch.randn(2, 7, 3), torch.randn(2, 3, 3), torch.rand(2, 7)
    own = [[min(float((y - z).square().sum()) for z in c[b]) for y in x[b]] for b in range(2)]
    torch.testing.assert_close(clustering_loss(x, c), torch.tensor([sum(row) for row in own]))
    truth = torch.tensor([sum(float(u) * d for u, d in zip(w[b], own[b], strict=True)) for b in range(2)])
    torch.testing.assert_close(clustering_loss(x, c, w), truth)


def test_blocks_pool_with_the_method_and_the_rounds_asked_for():
    torch.manual_seed(0)
    model, x = vit().eval(), torch.randn(2, 3, 8, 8)
    outs = [PooledViT(model, {0: 2}, method, iters)(x) for method, iters in (("kmeans", 5), ("kmeans", 0), ("topk", 5), ("grid", 5))]
    assert all(not torch.equal(a, b) for at, a in enumerate(outs) for b in outs[:at] if at != 2)
    torch.testing.assert_close(outs[1], outs[2])  # no round: the tokens of largest weight
    torch.testing.assert_close(PooledViT(model, {0: 99})(x), model(x))


def test_gaussian_filter_has_the_scale_given():
    q, k, v = torch.randn(3, 4), torch.nn.functional.normalize(torch.randn(5, 4), dim=-1), torch.randn(5, 2)
    for scale, told in ((1.0, {}), (0.3, {"scale": 0.3})):
        s = torch.tensor([[scale * sum(float(a * b) for a, b in zip(x, y, strict=True)) for y in k] for x in q])
        for found in softmax_as_gaussian_filter(q, k, v, **told):
            torch.testing.assert_close(found, s.softmax(-1) @ v, atol=1e-5, rtol=1e-5)
