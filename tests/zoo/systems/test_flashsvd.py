"""FlashSVD: half precision, rows that see nothing, bad input."""

import pytest
import torch

from regard import RegardError
from regard.adapt.lowrank import factorised
from regard.zoo.systems.flashsvd import flashsvd_attention, flashsvd_ffn


def factors(length=7, heads=2):
    return torch.randn(2, heads, length, 3), torch.randn(heads, 3, 8), torch.randn(heads, 8)


@pytest.mark.parametrize("absorb", [False, True])
def test_a_row_that_sees_nothing_is_zero(absorb):
    q, k, v = factors(), factors(), factors()
    mask = torch.tensor([[True] * 7, [False] * 7])
    out = flashsvd_attention(q, k, v, mask, absorb=absorb)
    assert (out[1] == 0).all() and out[0].isfinite().all()
    early = flashsvd_attention(factors(7), factors(4), factors(4), causal=True, absorb=absorb)
    assert (early[:, :, :3] == 0).all()


def test_half_precision():
    q, k, v = factors(), factors(), factors()
    half = flashsvd_attention(*(tuple(x.bfloat16() for x in one) for one in (q, k, v)))
    assert half.dtype == torch.bfloat16 and (half.float() - flashsvd_attention(q, k, v)).abs().max() < 0.3


def test_bad_input():
    q, k, v = factors(), factors(), factors()
    other = factors(5)
    for given, options in (
        (((q[0], q[1][:1], q[2]), k, v), {}),
        (((q[0], q[1], q[2][:1]), k, v), {}),
        ((q, k, other), {}),
        ((q, k, v), {"mask": torch.ones(2, 5, dtype=torch.bool)}),
        ((q, k, v), {"mask": torch.ones(2, 7)}),
        ((q, k, v), {"block_k": 0}),
        ((q, k, v), {"absorb": True, "rotate": lambda x, i: x}),
    ):
        with pytest.raises(RegardError, match="expected"):
            flashsvd_attention(*given, **options)
    with pytest.raises(RegardError, match="expected"):
        flashsvd_ffn(torch.randn(2, 3), torch.randn(4, 5), None, torch.randn(5, 2), torch.randn(2, 3), None)
    for bad in ({"rank": 0}, {"rank": 9}, {"rank": 2, "fisher": torch.ones(8), "gram": torch.eye(8)}):
        with pytest.raises(RegardError, match="expected 1 to 8"):
            factorised(torch.randn(8, 12), **bad)


@pytest.mark.parametrize("absorb", [False, True])
def test_outputs_have_the_dtype_of_what_is_projected(absorb):
    made = [(p.bfloat16(), right, bias) for p, right, bias in (factors(), factors(), factors())]
    out = flashsvd_attention(*made, absorb=absorb)
    assert out.dtype == torch.bfloat16
    truth = flashsvd_attention(*((p.float(), right, bias) for p, right, bias in made), absorb=absorb)
    assert (out.float() - truth).abs().max() < 0.05
