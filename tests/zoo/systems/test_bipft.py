"""BiPFT: padding, empty and odd input, first scales, what is refused, sizes at BERT's."""

import pytest
import torch

from regard import RegardError
from regard.nn.binary import Binarizer, BinaryLinear, packed, xnor_product
from regard.zoo.systems.bipft import BinaryBert, BinarySelfAttention, cost, masked


def test_bad_sizes_are_refused():
    for options in ({"dim": 9, "heads": 2}, {"dim": 8, "heads": 2, "rank": -1}):
        with pytest.raises(RegardError, match="expected dim"):
            BinarySelfAttention(**options)


def test_padding_is_not_read():
    torch.manual_seed(0)
    for rank in (0, 1):
        layer = BinarySelfAttention(8, 2, rank).double()
        x = torch.randn(2, 6, 8).double()
        truth = layer(x).detach()  # fits the scales
        padded = torch.cat((x, torch.full((2, 3, 8), float("nan")).double()), 1)
        keep = (torch.arange(9) < 6).expand(2, -1)
        with torch.no_grad():
            assert torch.allclose(layer(padded, keep)[:, :6], truth, atol=1e-12)
            assert layer(padded, keep).isfinite().all()


def test_scales_are_kept_with_the_weights():
    torch.manual_seed(0)
    layer, other = BinaryLinear(6, 4), BinaryLinear(6, 4)
    y = layer(torch.randn(3, 6))
    assert bool(layer.binarize.fitted) and y.shape == (3, 4)
    other.load_state_dict(layer.state_dict())
    x = 5 * torch.randn(3, 6)
    assert torch.equal(layer(x), other(x))
    one = Binarizer()
    assert one(torch.zeros(0, 3)).shape == (0, 3) and not bool(one.fitted)
    one.scale.data.fill_(-1.0)
    assert torch.allclose(one(torch.tensor([2.0, -2.0])), torch.tensor([1e-5, -1e-5]))


def test_products_of_odd_widths():
    torch.manual_seed(0)
    for n in (1, 62, 63, 64, 126, 127):
        a, b = torch.randn(2, 3, n), torch.randn(2, 4, n)
        assert torch.equal(xnor_product(packed(a), packed(b), n).float(), a.sign() @ b.sign().mT)


def test_masking_asks_for_a_share_of_tokens():
    ids = torch.arange(10_000).view(10, 1000) % 50
    seen, labels = masked(ids, 99, 50, torch.Generator().manual_seed(0))
    asked = labels != -100
    assert 0.13 < float(asked.float().mean()) < 0.17 and torch.equal(labels[asked], ids[asked]) and torch.equal(seen[~asked], ids[~asked])
    assert 0.75 < float((seen[asked] == 99).float().mean()) < 0.85 and 0.85 < float((seen[asked] != ids[asked]).float().mean()) < 0.95
    model = BinaryBert(100, 16, 1, 2, 1000, hidden=8)
    assert model(seen[:2, :33]).shape == (2, 33, 100) and model.head.weight is model.embed.weight


def test_cost_at_bert_s_sizes():
    found = cost(768, 12, 128, layers=12)
    assert found["full_operations"] / found["operations"] > 40 and found["full_bits"] / found["bits"] > 20


def test_a_small_bert_by_hand():
    torch.manual_seed(0)
    model, ids = BinaryBert(20, 8, 2, 2, 7, hidden=12).double(), torch.randint(20, (2, 5))
    keep = torch.arange(5) < torch.tensor([[5], [3]])
    model(ids, keep)  # fits the scales

    def norm(x, layer):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt() * layer.weight + layer.bias

    x = norm(model.embed.weight[ids] + model.place.weight[:5], model.norm)
    for block in model.blocks:
        x = block(x, keep)
        assert {block.norm1.eps, block.norm2.eps} == {1e-12}
    h = x @ model.transform.weight.T + model.transform.bias
    truth = norm(h * (1 + torch.erf(h / 2**0.5)) / 2, model.norm2) @ model.embed.weight.T + model.head.bias
    assert torch.allclose(model(ids, keep), truth, atol=1e-10)
    assert not torch.allclose(model(ids)[1, :3], truth[1, :3])


def test_cost_without_estimators():
    """Products alone: 64 of one bit are one, and a bit a weight but for scales, shifts and norms."""
    one, two = cost(8, 2, 5, rank=0), cost(8, 2, 5, rank=0, layers=2)
    weights = 4 * 8 * 8 + 2 * 8 * 32
    assert one["binary"] == 2 * 5 * weights + 4 * 5 * 5 * 8 and one["full"] == 0 and one["operations"] == one["binary"] / 64
    assert one["bits"] == weights + 32 * (12 * 8 + 2 * (8 + 32) + 10) and one["full_bits"] == 32 * (weights + 4 * 8 + 32 + 8 + 4 * 8)
    assert two == {name: 2 * value for name, value in one.items()}
