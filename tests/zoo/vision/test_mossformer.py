"""First values, refusals, short and half-precise sequences of MossFormer, and the mixtures it is shown on."""

import pytest
import torch

from regard import RegardError
from regard.tasks.mixtures import permuted_si_sdr, si_sdr, tones
from regard.zoo.vision.mossformer import ConvModule, JointGatedAttention, MossFormerSeparator, ScaleNorm, joint_attention


def test_first_values():
    torch.manual_seed(0)
    layer = JointGatedAttention(64)
    assert layer.gamma.shape == (4, 128) and float(layer.gamma.std()) == pytest.approx(0.02, rel=0.1) and float(layer.beta.abs().max()) == 0
    assert layer.hidden.linear.out_features == 256 and layer.out.linear.in_features == 128 and layer.hidden.conv.kernel_size == (17,)
    assert layer.group == 256 and layer.turn.dims == 32 and layer.hidden.drop.p == 0.1 and layer.hidden.conv.bias is None
    with torch.device("meta"):
        net = MossFormerSeparator()
    assert net.encoder.weight.shape == (512, 1, 16) and net.encoder.stride == (8,) and len(net.blocks) == 25
    assert float(ScaleNorm()(torch.full((4,), 3.0)).max()) == 1 and float(ScaleNorm()(torch.zeros(4)).max()) == 0


def test_dropout_is_of_the_chunks_weights_and_of_modules():
    torch.manual_seed(0)
    views = [torch.rand(1, 8, 4) for _ in range(5)]
    a, b = (joint_attention(*views, 4, dropout=0.5) for _ in range(2))
    assert not torch.equal(a, b)
    zero = [views[0] * 0, *views[1:]]
    assert torch.equal(joint_attention(*zero, 4, dropout=0.5), joint_attention(*zero, 4))
    layer, x = JointGatedAttention(8, 4, 4, dropout=0.9), torch.randn(1, 9, 8)
    assert not torch.equal(layer.train()(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))


def test_refusals():
    for options in ({"norm": "batch"}, {"kernel": 4}):
        with pytest.raises(RegardError, match="an odd kernel"):
            ConvModule(4, 4, **options)
    for options in ({"group": 0}, {"qk_dim": 5}, {"rotary": 3}, {"expansion": 0.3}):
        with pytest.raises(RegardError, match="positive and even"):
            JointGatedAttention(10, **options)
    with pytest.raises(RegardError, match="causal=True"):
        JointGatedAttention(8, 4, 4).step(torch.zeros(1, 1, 8))
    with pytest.raises(RegardError, match="even numbers"):
        MossFormerSeparator(kernel=5)
    with pytest.raises(RegardError, match="at least 16"):
        MossFormerSeparator(2, 8, 8, 1, group=4, qk_dim=4)(torch.zeros(1, 15))
    with pytest.raises(RegardError, match="expected the same"):
        permuted_si_sdr(torch.zeros(1, 2, 5), torch.zeros(1, 3, 5))


def test_any_length():
    layer = JointGatedAttention(8, 4, 4).eval()
    assert layer(torch.zeros(2, 0, 8)).shape == (2, 0, 8) and bool(layer(torch.randn(2, 1, 8)).isfinite().all())
    net = MossFormerSeparator(2, 8, 8, 1, group=4, qk_dim=4).eval()
    for samples in (16, 17, 23, 40):
        assert net(torch.randn(3, samples)).shape == (3, 2, samples)
    assert net.bfloat16()(torch.randn(1, 40).bfloat16()).isfinite().all()
    assert ScaleNorm().half()(torch.zeros(2, 4).half()).isfinite().all()


def test_mixtures_are_sums_of_tones_of_their_bands():
    x, y = tones(20, torch.Generator().manual_seed(0), samples=800, sources=3)
    torch.testing.assert_close(x, y.sum(1))
    peaks = torch.fft.rfft(y).abs().argmax(-1)
    for k in range(3):
        assert int(peaks[:, k].min()) >= 8 * 2**k - 2 and int(peaks[:, k].max()) <= 12 * 2**k + 2
    noisy, _ = tones(20, torch.Generator().manual_seed(0), sources=3, noise=0.5)
    assert float((noisy - x).std()) == pytest.approx(0.5, rel=0.05)
    assert float(si_sdr(3 * y[0, 0] + 1, y[0, 0])) > 60


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("causal", [False, True])
def test_joint_attention_of_short_sequences_token_by_token(length, causal):
    torch.manual_seed(0)
    group = 4
    a, b, c, d = (torch.randn(2, length, 3, dtype=torch.float64) for _ in range(4))
    v, rows = torch.randn(2, length, 5, dtype=torch.float64), []
    for t in range(length):
        row = torch.zeros(2, 5, dtype=torch.float64)
        for s in range(length):
            far = (c[:, t] * d[:, s]).sum(-1, keepdim=True) * v[:, s]
            if s // group == t // group and (s <= t or not causal):
                row = row + ((a[:, t] * b[:, s]).sum(-1, keepdim=True) / group).clamp_min(0) ** 2 * v[:, s]
            if not causal:
                row = row + far / length
            elif s // group < t // group:
                row = row + far / group
        rows.append(row)
    torch.testing.assert_close(joint_attention(a, b, c, d, v, group, causal), torch.stack(rows, 1))
