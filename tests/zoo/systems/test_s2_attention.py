"""S2-Attention: padded batches, both sides, bad input, and the model as it was."""

import pytest
import torch

from regard import RegardError
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.s2_attention import S2Cache, csr, s2_attention, s2_block_mask


def test_rows_of_a_padded_batch_get_what_they_get_alone():
    model = llama(sharp=2)
    ids = torch.randint(1, 50, (2, 30))
    mask = torch.ones_like(ids)
    ids[1, :13], mask[1, :13] = 0, 0
    with S2Cache(s2_block_mask(4, 80, 4, 1, 3, n_kv_heads=2), 4)(model):
        both = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    with S2Cache(s2_block_mask(4, 80, 4, 1, 3, n_kv_heads=2), 4)(model):
        alone = model.generate(ids[1:, 13:], max_new_tokens=30, do_sample=False)
    assert torch.equal(both[1, 30:], alone[0, 17:])


def test_a_layout_that_comes_back_to_blocks_keeps_them():
    model, ids = llama(), torch.randint(1, 50, (1, 30))
    with pytest.warns(UserWarning, match="come back"):
        policy = S2Cache(s2_block_mask(2, 80, 4, 1, 3, relative=True), 4)
    with policy(model) as session:
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert max(part.keys.shape[2] for layer in session.cache.layers for part in layer.parts) == 32


def test_both_sides():
    q, k, v = (torch.randn(1, 4, 48, 8, dtype=torch.float64) for _ in range(3))
    layout = s2_block_mask(4, 48, 8, 1, 3, relative=True, causal=False)
    seen = torch.tensor(
        [
            [[abs(i // 8 - j // 8) < 1 or (abs(i // 8 - j // 8) * 0 + i // 8 - j // 8 + h) % 3 == 0 for j in range(48)] for i in range(48)]
            for h in range(4)
        ]
    )
    truth = (q @ k.mT / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    assert torch.allclose(s2_attention(q, k, v, layout, 8, causal=False), truth, atol=1e-12)
    assert torch.equal(csr(layout.mT)[0][:, -1], layout.sum((1, 2)).int())


def test_bad_input():
    q = torch.randn(1, 4, 40, 8)
    layout = s2_block_mask(4, 40, 8)
    for wrong, told in ((layout[:3], "with 1, Hkv or H heads"), (layout.float(), "bool"), (layout[:, :4, :4], "as many blocks or more")):
        with pytest.raises(RegardError, match=told):
            s2_attention(q, q, q, wrong, 8)
    for options in ({"n_kv_heads": 3}, {"stride": 0}, {"local_blocks": 0}, {"n_dense_heads": 5}, {"homo_head": True, "n_dense_heads": 1}):
        with pytest.raises(RegardError, match="expected"):
            s2_block_mask(4, 40, 8, **options)
    with pytest.raises(RegardError, match="causal"):
        S2Cache(torch.ones(2, 4, 4, dtype=torch.bool))
    model = llama()
    with pytest.raises(RegardError, match="1 or the model's 2"), S2Cache(s2_block_mask(4, 40, 8), 8)(model):
        pass
    with S2Cache(s2_block_mask(2, 16, 8), 8)(model), pytest.raises(RegardError, match="expected"):
        model(torch.randint(1, 50, (1, 17)))
    assert s2_attention(q[:0], q[:0], q[:0], layout, 8).shape == q[:0].shape


def test_scale_and_parts_that_merge():
    q, k, v = (torch.randn(1, 4, 40, 8, dtype=torch.float64) for _ in range(3))
    layout = s2_block_mask(4, 40, 8, 1, 3)
    seen = layout.repeat_interleave(8, 1).repeat_interleave(8, 2) & torch.ones(40, 40, dtype=torch.bool).tril()
    s = (0.3 * q @ k.mT).masked_fill(~seen, -torch.inf)
    out, lse = s2_attention(q, k, v, layout, 8, scale=0.3, return_lse=True)
    assert torch.allclose(out, s.softmax(-1) @ v) and torch.allclose(lse, s.logsumexp(-1))
    assert torch.allclose(s2_attention(q, k, v, layout, 8, scale=0.3), out)
    assert torch.allclose(s2_attention(q[:, :, 35:], k, v, layout, 8, scale=0.3), out[:, :, 35:])


def test_shares_of_heads_by_hand():
    """(key heads, blocks, blocks) from the formula, with every option."""
    for heads, kv, options in (
        (8, 4, {}),
        (2, 2, {"stride": 6}),
        (8, 4, {"step": 3, "offset": 1}),
        (4, 4, {"n_dense_heads": 1}),
        (4, 4, {"homo_head": True, "offset": 2}),
        (4, 2, {"relative": True, "local_blocks": 2, "stride": 3}),
        (4, 4, {"relative": True, "local_blocks": 2, "causal": False}),
    ):
        own = {"local_blocks": 1, "stride": 4, **options}
        layout = s2_block_mask(heads, 70, 8, n_kv_heads=kv, **own)
        step = own.get("step", max(1, own["stride"] // heads))
        truth = [
            [
                [
                    (j <= i or not own.get("causal", True))
                    and (
                        (i - j if own.get("causal", True) else abs(i - j)) < own["local_blocks"]
                        or ((i - j if own.get("relative") else j) + g * step + own.get("offset", 0)) % own["stride"] == 0
                        or g >= kv - own.get("n_dense_heads", 0)
                    )
                    for j in range(9)
                ]
                for i in range(9)
            ]
            for g in range(1 if own.get("homo_head") else kv)
        ]
        assert torch.equal(layout, torch.tensor(truth)), options
