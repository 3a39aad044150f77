"""Refusals and edges of re-identification losses, clips, light gates, their search and attention-guided masks."""

import pytest
import torch
from layers import vit
from torch import nn

from regard import RegardError
from regard.nn.retrieval import CentreLoss, retrieval_scores, triplet_batch_hard
from regard.tasks.identities import patterns, tracks
from regard.zoo.vision import attmask as attmask_row
from regard.zoo.vision import little_attention_block
from regard.zoo.vision.attention_cl import ClipReID, OSMCAALoss, TemporalAttentionPool
from regard.zoo.vision.attmask import IBOTLoss, MaskedDistiller, attmask, block_mask, momentum, temperature
from regard.zoo.vision.little_attention_block import LiteAttention, NonLocal, Placement, pareto, placement_search


def test_scores_of_retrieval_by_hand():
    query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.9, 0.1], [1.0, 0.05], [0.0, 1.0]])
    found = retrieval_scores(query, torch.tensor([1]), gallery, torch.tensor([1, 0, 1]))
    assert found["rank1"] == 0 and found["map"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_attention_cl_losses_of_batches_without_pairs_are_finite():
    x, loss = torch.randn(3, 4, requires_grad=True), OSMCAALoss()
    for labels in (torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0])):
        loss(x, labels, torch.randn(4, 3)).backward()
        assert x.grad.isfinite().all()
    same = torch.ones(4, 4, requires_grad=True)  # equal features
    loss(same, torch.tensor([0, 0, 1, 1]), torch.randn(4, 3)).backward()
    assert same.grad.isfinite().all()


def test_tracks_hide_whole_frames():
    g = torch.Generator().manual_seed(0)
    looks = patterns(5, g)
    x, label, bare = tracks(looks, 3, g, noise=0.0)
    assert x.shape == (15, 4, 3, 8, 8) and (bare.sum(1) == 2).all() and label.bincount().tolist() == [3] * 5
    assert torch.equal(x[~bare], looks[label][:, None].expand(-1, 4, -1, -1, -1)[~bare])


def test_attention_cl_necks_keep_their_bias_and_centres_their_scale():
    net = ClipReID(nn.Conv2d(3, 6, 1), 6, 4, TemporalAttentionPool(6, 5, (2, 2)))
    features, logits, weights = net(torch.randn(3, 4, 3, 2, 2))
    assert not net.neck.bias.requires_grad and logits.shape == (3, 4) and torch.allclose(weights.sum(1), torch.ones(3))
    assert float(net.classifier.weight.detach().std()) < 0.002
    centres = CentreLoss(4, 6)
    (5e-4 * centres(features, torch.tensor([0, 1, 1]))).backward()
    before = centres.centres.grad.clone()
    centres.rescale(5e-4)
    assert torch.allclose(centres.centres.grad, before / 5e-4)


def test_first_values_of_attention_cl():
    torch.manual_seed(0)
    pool = TemporalAttentionPool(16, 64, (3, 2))
    assert (
        float(pool.conv.weight.detach().std()) == pytest.approx((2 / 96) ** 0.5, rel=0.05)
        and float(pool.conv.bias.detach().abs().max()) == 0
    )


def test_little_attention_block_search_takes_the_cheapest_of_equals():
    one, two, three = Placement((0,), 1.0, 2.0), Placement((1,), 1.0, 1.0), Placement((2,), 0.5, 3.0)
    assert pareto([one, two, three]) == [two]


def test_little_attention_block_search_is_greedy_over_many_slots():
    def make(slots):
        layer = nn.Identity()
        layer.slots = slots
        return layer

    found = placement_search(
        make, 12, lambda m: sum(range(13 - len(m.slots), 13)) if m.slots else 0.0, lambda m: float(len(m.slots)), budget=3.0
    )
    assert [len(one.slots) for one in found] == [0, 1, 2, 3]


def test_first_values_of_little_attention_block_and_non_local():
    x = torch.randn(2, 8, 4, 5)
    assert torch.equal(NonLocal(8)(x), x) and torch.allclose(LiteAttention(32)(torch.ones(1, 32, 3, 3)), torch.full((1, 32, 3, 3), 1.25))


def test_attmask_of_nothing_and_everything():
    a = torch.rand(4, 9)
    assert not attmask(a, prob=0.0).any() and not attmask(a, ratio=0.0).any()
    assert attmask(a, ratio=1.0, prob=1.0).all() and attmask(a, "hint", 0.5, 1.0, show=0.0).sum() == 4 * 4
    assert attmask(a, "hint", 1.0, 1.0, show=1.0).sum() == 0
    assert not attmask(a.requires_grad_(), prob=1.0).requires_grad


def test_attmask_blocks_stay_below_their_ratio():
    g = torch.Generator().manual_seed(0)
    masks = [block_mask((14, 14), 0.3, g) for _ in range(20)]
    sizes = [int(m.sum()) for m in masks]
    assert max(sizes) <= int(0.3 * 196) and min(sizes) > 30 and not torch.equal(masks[0], masks[1])


def test_attmask_blocks_are_a_mode_of_their_own():
    a = torch.rand(3, 12)
    found = attmask(a, "block", 0.5, 1.0, grid=(3, 4), generator=torch.Generator().manual_seed(0))
    assert found.shape == (3, 12) and int(found.sum()) > 0 and int(found.sum(1).max()) <= 6
    assert attmask(torch.rand(0, 16), "block").shape == (0, 16) and not attmask(a, "block", 0.5, 0.0, grid=(3, 4)).any()
    net = MaskedDistiller(vit(), 8, "block", ratio=0.9, spread=0.0, prob=1.0)
    assert net([torch.randn(2, 3, 8, 8) for _ in range(2)]).isfinite()


def test_attmask_temperatures_warm_up():
    assert [round(temperature(step, 3), 3) for step in range(5)] == [0.04, 0.055, 0.07, 0.07, 0.07]
    assert temperature(0, 1) == temperature(0, 0) == 0.07


def test_attmask_momentum_follows_half_a_cosine():
    assert [round(momentum(step, 4, 0.9), 6) for step in range(5)] == [0.9, 0.914645, 0.95, 0.985355, 1.0]


def test_attmask_ratios_are_drawn_around_their_middle(monkeypatch):
    asked = []

    def seen(attention, mode, ratio, prob, show, grid):
        asked.append((mode, ratio, prob, show, grid))
        return torch.zeros_like(attention, dtype=torch.bool)

    monkeypatch.setattr(attmask_row, "attmask", seen)
    views, draws = [torch.randn(2, 3, 8, 8) for _ in range(2)], iter((0.0, 0.5, 0.75, 0.0, 0.999))
    monkeypatch.setattr(attmask_row.torch, "rand", lambda *shape: torch.tensor(next(draws)))
    for net, count in ((MaskedDistiller(vit(), 8, "hint", 0.3, 0.2, 0.7, 0.05), 3), (MaskedDistiller(vit(), 8, ratio=0.5, spread=0.8), 2)):
        for _ in range(count):
            net(views)
    assert [ratio for _, ratio, *_ in asked] == pytest.approx([0.1, 0.3, 0.4, 0.0, 1.0])
    assert asked[0][:1] + asked[0][2:] == ("hint", 0.7, 0.05, (2, 2)) and asked[4][:1] + asked[4][2:] == ("high", 0.5, 0.1, (2, 2))


def test_attmask_crops_need_a_host_that_takes_their_size():
    views, crops = [torch.randn(2, 3, 8, 8) for _ in range(2)], [torch.randn(2, 3, 4, 4)]
    with pytest.raises(RegardError, match="dynamic_img_size=True"):
        MaskedDistiller(vit(), 8)(views, local=crops)
    with pytest.raises(RegardError, match="expected 2 in each"):
        MaskedDistiller(vit(), 8)(views, local=[torch.randn(3, 3, 8, 8)])


def test_attmask_student_learns_and_its_teacher_follows():
    torch.manual_seed(0)
    net = MaskedDistiller(vit(), 8, prob=1.0, ratio=0.5, spread=0.0)
    views = [torch.randn(3, 3, 8, 8) for _ in range(2)]
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-3)
    first = {name: p.detach().clone() for name, p in net.named_parameters()}
    for step in range(12):
        loss = net(views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.follow(momentum(step, 12))
    moved = {name for name, p in net.named_parameters() if not torch.equal(first[name], p)}
    assert {
        f"{side}.{part}.weight" for side in ("student", "teacher") for part in ("vit.patch_embed.proj", "vit.blocks.1.attn.qkv", "head.0")
    } <= moved
    assert net.mask_token.grad.abs().max() > 0
    assert all(p.grad is None for p in net.teacher.parameters())
    assert momentum(0, 10) == pytest.approx(0.996) and momentum(10, 10) == 1
    assert net(views, torch.zeros(6, 4, dtype=torch.bool)).isfinite()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: TemporalAttentionPool(6, weights="max"), id="attention-cl"),
        pytest.param(lambda: TemporalAttentionPool(6, 5, (4, 3))(torch.randn(2, 3, 6, 4, 4)), id="attention-cl"),
        pytest.param(lambda: TemporalAttentionPool(6, 5, (4, 3))(torch.randn(2, 0, 6, 4, 3)), id="attention-cl"),
        pytest.param(lambda: OSMCAALoss()(torch.randn(3, 4), torch.tensor([0, 1, 5]), torch.randn(4, 3)), id="attention-cl"),
        pytest.param(lambda: OSMCAALoss()(torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.randn(3, 4)), id="attention-cl"),
        lambda: triplet_batch_hard(torch.randn(3, 4), torch.zeros(3)),
        lambda: retrieval_scores(torch.randn(1, 2), torch.tensor([3]), torch.randn(2, 2), torch.tensor([0, 1])),
        pytest.param(lambda: LiteAttention(8), id="little-attention-block"),
        pytest.param(lambda: LiteAttention(16, kernel=2), id="little-attention-block"),
        pytest.param(lambda: placement_search(lambda s: nn.Identity(), -1, lambda m: 0.0, lambda m: 0.0), id="little-attention-block"),
        pytest.param(lambda: attmask(torch.rand(4)), id="attmask"),
        pytest.param(lambda: attmask(torch.rand(2, 4), "blocks"), id="attmask"),
        pytest.param(lambda: attmask(torch.rand(2, 5), "block"), id="attmask"),
        pytest.param(lambda: attmask(torch.rand(2, 4), ratio=1.5), id="attmask"),
        pytest.param(lambda: attmask(torch.rand(2, 4), draw=torch.rand(3)), id="attmask"),
        pytest.param(lambda: IBOTLoss(4, 4, views=1), id="attmask"),
    ],
)
def test_refusals(make):
    with pytest.raises(RegardError, match="expected"):
        make()


def test_little_attention_block_search_stops_where_no_slot_is_within_budget():
    tried = []

    def make(slots):
        tried.append(slots)
        return slots

    found = placement_search(make, 3, lambda m: float(sum(m)), lambda m: float(len(m)), budget=1.0, exhaustive=2)
    assert found == [Placement((), 0.0, 0.0), Placement((2,), 2.0, 1.0)]
    assert tried == [(), (0,), (1,), (2,), (0, 2), (1, 2)]


def test_little_attention_block_latencies_are_medians_after_three_calls(monkeypatch):
    calls, clock = [], iter(range(1000))
    monkeypatch.setattr(little_attention_block.time, "perf_counter", lambda: float(next(clock)) ** 2)

    class Seen(nn.Module):
        def forward(self, x):
            calls.append(tuple(x.shape))
            return x

    took = little_attention_block.seconds(Seen(), (2, 3), 5)
    assert calls == [(2, 3)] * 8
    assert took == 8**2 - 7**2  # ticks 0, 1, 2 warm up; of five pairs the third is the median, by a clock that runs faster and faster
    block, base = Seen(), Seen()
    monkeypatch.setattr(little_attention_block, "seconds", lambda model, shape, runs: {block: 6.0, base: 4.0}[model] * runs * shape[0])
    assert little_attention_block.latency_overhead(block, base, (2, 3), 7) == 1.5 and not block.training and not base.training
