"""First values, refusals, sizes and precision of slow nets and the blocks that live on them."""

import math

import pytest
import torch

from regard import RegardError
from regard.nn.images.hyper_kernels import GroupedStandard, SlowNet, grid_of, standardised
from regard.zoo.vision.hyperzzw import HyperInteract, HyperZZWLocal, SFNEBlock, Terminator, hyperzzw_global, slow_loss, terminator_loss

SMALL = {"kernels": (3, 1, 5, 3), "hidden": (4, 4, 4, 4, 4), "groups": 2, "omega": 1.0}


def test_first_values():
    torch.manual_seed(0)
    net = SlowNet(16, (8, 8), 200, 2, omega=3.0, context=5)
    for at, layer in enumerate(net.filters):
        gamma = layer.weight.abs() / (2 * math.pi * 3.0 * 2**-0.5)  # uniform times Gamma(6 / (l + 1), 1): half its mean on average
        assert float(gamma.mean()) == pytest.approx(3 / (at + 1), rel=0.15) and float(layer.bias.abs().max()) == 0
    for layer in (*net.linears, *net.fast):
        assert (
            float(layer.weight.abs().max()) == pytest.approx((3 / 200) ** 0.5, rel=0.01)
            and float(layer.bias.min()) == float(layer.bias.max()) == 1
        )
    assert float(net.last.weight.abs().max()) == pytest.approx((3 / 200) ** 0.5 / 8, rel=0.02) and float(net.last.bias.abs().max()) == 0
    assert float(net.kept.min()) == 1 and float(net.unit.max()) == pytest.approx(0.1) and float(net.place.abs().max()) == 0
    block = SFNEBlock(48, 4, **{**SMALL, "groups": 12})
    assert float(block.bottleneck.weight.std()) == pytest.approx((2 / 480) ** 0.5, rel=0.05) and float(block.mix.bias.abs().max()) == 0
    assert float(block.slow.q.weight.abs().max()) == pytest.approx((3 / 48) ** 0.5, rel=0.02) and block.drop.p == 0.05
    with torch.device("meta"):
        made = Terminator()
    assert (
        [b.channels for b in made.blocks] == [3, 12, 36, 72, 144]
        and made.head.in_features == 288
        and [b.earlier for b in made.blocks] == [0, 0, 1, 1, 2]
    )
    assert [len(b.net.linears) for b in made.blocks] == [3, 2, 2, 2, 2] and made.blocks[0].net.last.in_features == 64
    assert [layer.net.shape[0] for layer in made.blocks[1].locals] == [3, 9, 5, 7] and made.blocks[0].norm.groups == 12


def test_many_turns_are_exact_enough_in_half_precision():
    torch.manual_seed(0)
    net = SlowNet(2, (32, 32), 8, omega=50.0)
    truth, single = net.double()(), net.float()()
    assert float((single - truth).abs().max()) < 1e-2 * float(truth.abs().max())
    half = net.bfloat16()()
    assert half.dtype == torch.bfloat16 and bool(half.isfinite().all())


def test_other_sizes_and_refusals():
    torch.manual_seed(0)
    net = SlowNet(2, (4, 4), 5, omega=1.0)
    net.place.data.normal_()
    assert net(grid_of((6, 3), net.last.weight)).shape == (2, 6, 3)
    assert SlowNet(1, (5,), 3)(grid_of((9,), torch.zeros(1))).shape == (1, 9)
    with pytest.raises(RegardError, match="positive numbers"):
        SlowNet(2, (4, 4), layers=0)
    with pytest.raises(RegardError, match=r"expected \(2, ...\)"):
        net(grid_of((4,), net.last.weight))
    for context, x in ((0, torch.zeros(1, 2, 4, 4)), (2, None)):
        with pytest.raises(RegardError, match="if context, and none without"):
            SlowNet(2, (3, 3), context=context)(x=x)
    with pytest.raises(RegardError, match="multiple of groups=12"):
        GroupedStandard(16)
    with pytest.raises(RegardError, match="product of two maps"):
        hyperzzw_global(torch.zeros(2, 3, 4), torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    with pytest.raises(RegardError, match="an odd number"):
        HyperZZWLocal(2, 4)
    with pytest.raises(RegardError, match="expected more pixels"):
        standardised(torch.zeros(4, 2, 1, 1))
    assert standardised(torch.zeros(4, 2, 1, 1), batch=True).shape == (4, 2, 1, 1)
    block = SFNEBlock(4, 5, earlier=1, **SMALL)
    with pytest.raises(RegardError, match="expected 1, dividing 4"):
        block(torch.zeros(1, 4, 5, 5))
    with pytest.raises(RegardError, match="expected 1, dividing 4"):
        block(torch.zeros(1, 4, 5, 5), torch.zeros(1, 3, 5, 5))
    with pytest.raises(RegardError, match="side=5"):
        block(torch.zeros(1, 4, 5, 6), torch.zeros(1, 2, 5, 5))
    for options in ({"kernels": (3, 3)}, {"hidden": (4,)}, {"earlier": 3}):
        with pytest.raises(RegardError, match="four, five, and 0 to 2"):
            SFNEBlock(4, 5, **{**SMALL, **options})
    with pytest.raises(RegardError, match="side=4"):
        Terminator(2, 4, 3, (1,) * 5, (1,) * 5, (0.0,) * 5, **SMALL)(torch.zeros(1, 2, 15))
    with pytest.raises(RegardError, match="5 of each"):
        Terminator(factors=(2, 2))


def test_nothing_is_added_past_a_block_and_losses_reach_slow_nets():
    torch.manual_seed(0)
    net = Terminator(2, 4, 3, (1,) * 5, (1,) * 5, (0.0,) * 5, **SMALL)
    _, loss = net.with_loss(torch.randn(2, 2, 4, 4))
    loss.backward()
    assert all(float(b.net.last.weight.grad.abs().max()) > 0 for b in net.blocks) and net.head.weight.grad is None
    assert float(slow_loss([b.net() for b in net.blocks][:1], net.factors)) == 0
    assert HyperInteract(2, 4)(torch.zeros(1, 2, 4, 4)).shape == (1, 2, 4, 4)


def test_gradients():
    torch.manual_seed(0)
    layer = SFNEBlock(2, 3, 2, layers=1, kernels=(3, 1, 1, 1), hidden=(2,) * 5, groups=2, omega=1.0).double().eval()
    for p in layer.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer.interact, x) and torch.autograd.gradcheck(
        lambda y: layer.slow(y) + hyperzzw_global(layer.net(), y, y), x
    )


def test_loss_of_smoothed_labels():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 3, 1])
    for smoothing in (0.1, 0.4):
        truth = 0.0
        for row, label in zip(logits.log_softmax(-1), labels.tolist(), strict=True):
            truth -= sum(float(row[c]) * (smoothing / 4 + (1 - smoothing) * (c == label)) for c in range(4)) / 3
        assert float(terminator_loss(logits, labels, torch.tensor(0.25), smoothing)) == pytest.approx(truth + 0.25)
