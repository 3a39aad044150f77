"""Rows of images and of sparse attention that measure in float32 whatever they are given: values of half precision that half precision's own sums
would lose, or that leave its range."""

from __future__ import annotations

import math

import torch

import regard
from regard.zoo.sparse.dhsa import chunk_keys, selected_tokens
from regard.zoo.sparse.dma import smoothed
from regard.zoo.sparse.flash_window_attention import scores
from regard.zoo.sparse.hylra import profile
from regard.zoo.vision.acmil import stochastic_topk_mask
from regard.zoo.vision.convit import GPSA, conv_to_gpsa
from regard.zoo.vision.mossformer import MossFormerSeparator, ScaleNorm
from regard.zoo.vision.norm_loss import norm_loss, row_spread
from regard.zoo.vision.token_pooling import token_pool


def test_dhsa_sums_chunks_in_float32() -> None:
    torch.manual_seed(0)
    q, k = (40 + torch.randn(1, 2, 600, 8)).half(), (40 + torch.randn(1, 2, 600, 8)).half()
    chunks = (torch.arange(600) // 300)[None]
    found = chunk_keys(k, chunks)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, k.float().mean(1).view(1, 2, 300, 8).sum(2) / 300**0.5)
    starts = (torch.arange(600) % 37 == 0)[None].float()
    chosen = [selected_tokens(x, y, 0, starts, 120, 200, 20, 0, 16, "fixed") for x, y in ((q, k), (q.float(), k.float()))]
    assert chosen[0] is not None and chosen[1] is not None and torch.equal(chosen[0], chosen[1])


def test_dma_counts_blocks_of_keys_exactly() -> None:
    keep = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    keep[..., 5, :4] = torch.tensor([True, False, True, True])
    assert smoothed(keep, 3)[0, 0, 5].tolist() == [True] * 3 + [False] * 3  # 2 of 3; 1 of 3


def test_flash_window_attention_adds_up_features_in_float32() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 9, 512).half() for _ in range(2))
    found, wide = scores(q, k, None, None, 1.0, 1), scores(q.float(), k.float(), None, None, 1.0, 512)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, wide.half(), atol=2e-3, rtol=1e-2)
    big = torch.full((1, 1, 2, 64), 40.0).half()
    assert bool(scores(big, big, None, None, 0.1, 16).isfinite().all())  # 102400 before the scale


def test_hylra_profiles_are_in_double_precision() -> None:
    torch.manual_seed(0)
    layers = [tuple(torch.randn(1, heads, 20, 4) for heads in (2, 1, 1)) for _ in range(2)]
    found = profile(layers, 3)  # type: ignore[arg-type]
    assert {x.dtype for x in (found.overlap, found.mass, found.error, found.sensitivity)} == {torch.float64}
    assert float(found.overlap[0, 0]) == float(found.overlap[1, 1]) == 1.0
    assert float(found.overlap[0, 1] * 3 * 17) == round(float(found.overlap[0, 1] * 3 * 17), 9)


def test_acmil_masks_the_whole_part_of_a_share_as_python_has_it() -> None:
    """int(100 0.29) is 28: the product lies under 29 in double precision alone."""
    assert int(100 * 0.29) == 28 and stochastic_topk_mask(torch.randn(1, 100), 100, 0.29).sum() == 28


def test_comateformer_distances_are_float32_s() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 5, 400).half() for _ in range(3))
    found = regard.attend(q / 20, k / 20, v, regard.get("comateformer"))
    wide = regard.attend((q / 20).float(), (k / 20).float(), v.float(), regard.get("comateformer"))
    torch.testing.assert_close(found.float(), wide, atol=2e-3, rtol=2e-2)


def test_convit_places_far_apart_keep_their_distance() -> None:
    """50^2 + 49^2 = 4901 lies between values of half precision that are 4 apart."""
    torch.manual_seed(0)
    layer = GPSA(4, 4)
    with torch.no_grad():
        layer.position.weight.normal_()
        layer.half()
        wide = GPSA(4, 4)
        wide.load_state_dict(layer.float().state_dict())
    found = layer.half().scores(torch.zeros(1, 51 * 50, 4).half(), (51, 50))[2]
    torch.testing.assert_close(found, wide.scores(torch.zeros(1, 51 * 50, 4), (51, 50))[2].half())
    conv = torch.nn.Conv2d(9, 9, 3, padding=1)
    conv.weight.data = torch.einsum("ot,it->oit", torch.randn(9, 9), torch.randn(9, 9)).unflatten(-1, (3, 3)).contiguous()
    assert conv_to_gpsa(conv).out.weight.dtype == torch.float32


def test_mossformer_norms_and_places_of_half_precision() -> None:
    x = torch.tensor([300.0, -300.0, 300.0, 300.0]).half()  # squares above 65504
    assert ScaleNorm().half()(x).tolist() == [1, -1, 1, 1]
    small = MossFormerSeparator(2, 8, 6, 1, group=4, qk_dim=4)
    found = small.places(torch.zeros(1, 6, 5000))
    for c, t in ((0, 4999), (1, 4321), (2, 17)):
        angle = t * 10000 ** (-2 * c / 6)
        assert abs(float(found[c, t]) - math.sin(angle)) < 1e-6 and abs(float(found[3 + c, t]) - math.cos(angle)) < 1e-6


def test_norm_loss_of_half_precision_is_finite() -> None:
    weight = torch.full((2, 4), 200.0).half()  # rows of norm 400, whose squares half precision does not hold
    assert float(norm_loss([weight], 1.0)) == 2 * 399.0**2 and row_spread([weight])["0"]["max"] == 400
    assert norm_loss([weight.double(), weight], 1.0).dtype == torch.float64


def test_token_pooling_measures_half_precision_s_distances() -> None:
    torch.manual_seed(0)
    x = (300 * torch.randn(1, 12, 8)).half()
    found, wide = token_pool(x, 4), token_pool(x.float(), 4)
    assert torch.equal(found.assign, wide.assign) and found.tokens.dtype == torch.float16
    torch.testing.assert_close(found.tokens.float(), wide.tokens, atol=1.0, rtol=5e-3)
