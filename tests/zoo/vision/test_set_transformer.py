"""First values, mixers, heads of two scales and empty sets of the set transformer."""

import pytest
import torch
from torch import nn

from regard import RegardError
from regard.zoo.vision.set_transformer import ISAB, MAB, PMA, SAB, SetTransformer


def test_first_values_of_learned_points():
    torch.manual_seed(0)
    for made, count in ((ISAB(3, 16, 2, 40).points, 40), (PMA(16, 2, 40).seeds, 40)):
        edge = (6 / (count * 16 + 16)) ** 0.5
        assert made.shape == (1, count, 16) and 0.97 * edge < float(made.detach().abs().max()) <= edge


def test_parts_of_the_model():
    net = SetTransformer(3, 5)
    assert [type(layer) for layer in net.encoder] == [ISAB, ISAB] and [layer.points.shape for layer in net.encoder] == [(1, 32, 128)] * 2
    assert net.pool.seeds.shape == (1, 1, 128) and isinstance(net.pool.rff, nn.Identity) and len(net.mix) == 1
    assert {m.heads for m in net.modules() if isinstance(m, MAB)} == {4}
    assert [len(SetTransformer(3, 5, 8, 2, 2, mixers=n).mix) for n in (0, 1, 2)] == [0, 1, 2]
    assert [type(layer) for layer in SetTransformer(3, 5, 8, 2, 0).encoder] == [SAB, SAB]
    assert SetTransformer(3, 5, 8, 2, 2, 4)(torch.randn(2, 6, 3)).shape == (2, 4, 5)
    with pytest.raises(RegardError, match="mixers=-1"):
        SetTransformer(3, 5, mixers=-1)


def test_mixers_follow_one_another():
    net, x = SetTransformer(3, 5, 8, 2, 2, 3, mixers=2), torch.randn(2, 6, 3)
    h = x
    for layer in net.encoder:
        h = layer(h)
    h = net.pool(h)
    for layer in net.mix:
        h = layer.mab(h, h)
    torch.testing.assert_close(net(x), net.head(h))


def test_an_empty_set_reads_nothing():
    torch.manual_seed(0)
    pool, x = PMA(8, 2, 3), torch.randn(2, 4, 8)
    keep = torch.tensor([[True] * 4, [False] * 4])
    h = pool.mab.q(pool.seeds[0])
    torch.testing.assert_close(pool(x, keep)[1], h + torch.relu(pool.mab.out(h)))
    torch.testing.assert_close(pool(x, keep)[:1], pool(x[:1]))
    poisoned = torch.where(keep[..., None], x, torch.nan)
    torch.testing.assert_close(pool(poisoned, keep), pool(x, keep))
    for norm in (False, True):
        net = SetTransformer(8, 2, 8, 2, 3, norm=norm)
        assert net(x, keep).isfinite().all()
