"""S2-Attention: padded batches, both sides, bad input, and the model as it was."""

import pytest
import torch

from regard import RegardError
from regard.adapt.host import cache_argument
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.s2_attention import S2Cache, csr, kv_efficient, s2_attention, s2_block_mask


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


@pytest.mark.parametrize("shared", [False, True])
def test_what_stays_is_what_a_later_token_can_see(shared):
    model, ids = llama(), torch.randint(1, 50, (1, 14))
    layout = s2_block_mask(4, 24, 4, 1, 3, n_kv_heads=2, homo_head=shared)
    for steps in (1, 3, 6, 11):  # the last one reads the layout's last place
        with S2Cache(layout, 4)(model) as session:
            model.generate(ids, max_new_tokens=steps, do_sample=False)
        last = 14 + steps - 2  # what was drawn last is not read
        for layer in session.cache.layers:
            for part in layer.parts:
                for h, head in enumerate(part.heads.tolist()):
                    own = layout[0 if shared else head]
                    rows = range(min(last + 1, 23) // 4, 6)
                    truth = {j for j in range(last + 1) if any(bool(own[i, j // 4]) for i in rows)}
                    assert set(part.places[0, h][part.alive[0, h]].tolist()) == truth


def test_a_layout_in_lists_of_columns():
    torch.manual_seed(0)
    for shape in ((1, 1, 1), (2, 5, 5), (3, 4, 7)):
        layout = torch.rand(shape) < 0.4
        layout[:, 0, 0] = True
        starts, columns = csr(layout)
        assert starts.dtype == columns.dtype == torch.int32 and starts.shape == (shape[0], shape[1] + 1)
        for own, begin, listed in zip(layout, starts.tolist(), columns.tolist(), strict=True):
            flat = [j for row in own.tolist() for j, seen in enumerate(row) if seen]
            assert listed == flat + [-1] * (columns.shape[1] - len(flat))
            assert begin == [int(own[:i].sum()) for i in range(shape[1] + 1)]
        assert columns.shape[1] == int(layout.sum((1, 2)).max())


def test_layouts_that_free_a_cache():
    """A head that has left a block behind it out never reads it again."""
    torch.manual_seed(0)
    found = []
    for _ in range(200):
        layout = (torch.rand(2, 4, 4) < 0.7).tril()
        again = [bool(layout[h, i, j]) and not bool(layout[h, i - 1, j]) for h in range(2) for i in range(1, 4) for j in range(i)]
        assert kv_efficient(layout) == (not any(again))
        found.append(kv_efficient(layout))
    assert set(found) == {True, False}


@torch.no_grad()
def test_the_model_s_own_scale_of_scores():
    model, ids = llama(sharp=2), torch.randint(1, 50, (1, 11))
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.9
    truth = model(ids, use_cache=False).logits
    with S2Cache(s2_block_mask(4, 16, 4, 1, 1, n_kv_heads=2), 4)(model):  # a stride of 1 sees everything
        first = model(ids[:, :9], use_cache=True)
        later = model(ids[:, 9:], use_cache=True, **{cache_argument(model): first.past_key_values})
    assert torch.allclose(torch.cat((first.logits, later.logits), 1), truth, atol=1e-5)
