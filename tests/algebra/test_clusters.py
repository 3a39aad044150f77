"""Tokens in the order of their clusters: k-means by loops, planted groups found, what stays, and what pooled blocks gain."""

import math

import pytest
import torch

from regard import RegardError, attend, get
from regard.algebra.clusters import by_cluster, farthest, k_means


def lloyd(points, count, iters):
    """Of one list of points, by loops."""
    centres = [points[0]]
    while len(centres) < count:
        centres.append(max(points, key=lambda p: min(math.dist(p, c) for c in centres)))

    def nearest(p):
        return min(range(count), key=lambda c: math.dist(p, centres[c]))

    for _ in range(iters):
        groups = [[p for p in points if nearest(p) == c] for c in range(count)]
        centres = [[sum(x) / len(g) for x in zip(*g, strict=True)] if g else centres[c] for c, g in enumerate(groups)]
    return [nearest(p) for p in points]


@pytest.mark.parametrize("iters", [0, 1, 5])
def test_k_means_is_that_of_loops(iters):
    x = torch.randn(2, 3, 17, 4, dtype=torch.float64)
    found = k_means(x, 4, iters)
    for b in range(2):
        for h in range(3):
            assert found[b, h].tolist() == lloyd(x[b, h].tolist(), 4, iters)


def test_an_empty_cluster_keeps_its_centre():
    x = torch.ones(1, 6, 2)
    assert k_means(x, 3, 4).tolist() == [[0] * 6] and farthest(x, 3).shape == (1, 3)


def test_tokens_of_a_cluster_follow_one_another_and_the_last_ones_stay():
    topic = torch.randint(5, (2, 3, 40))
    x = torch.eye(5)[topic] * 10 + 0.1 * torch.randn(2, 3, 40, 5)
    x = torch.cat((x, torch.randn(2, 3, 4, 5)), 2).half()
    p = by_cluster(x, 5, extra=4)
    found = topic.gather(-1, p.order[..., :40])
    assert int((found.diff(dim=-1) != 0).sum()) == 4 * 6 and torch.equal(p.order[..., 40:], torch.arange(40, 44).expand(2, 3, 4))
    inside = p.order[..., :40].diff(dim=-1) < 0
    assert int(inside.sum()) <= 4 * 6  # in their old order but from one cluster to the next
    assert torch.equal(p.invert(p.apply(x)), x)


def test_psa_on_pooled_blocks_of_alike_tokens_say_what_dense_attention_says():
    """Topics in random order: eight neighbours have nothing in common, eight of a cluster do."""
    torch.manual_seed(0)
    topic = torch.arange(16).repeat_interleave(32)[torch.randperm(512)]
    centres = 3 * torch.randn(16, 16)
    q, k, v = (centres[topic][None, None] + 0.2 * torch.randn(1, 2, 512, 16) for _ in range(3))
    levels, truth = torch.full((1, 2, 16, 16), 8), attend(q, k, v)
    gap = {}
    for name, p in (("as they come", None), ("clusters", by_cluster(k, 16))):
        a, b, c = (x if p is None else p.apply(x) for x in (q, k, v))
        out = attend(a, b, c, get("psa", block_size=32), levels=levels)
        gap[name] = float(((out if p is None else p.invert(out)) - truth).norm() / truth.norm())
    assert gap["clusters"] < 0.1 < 0.5 < gap["as they come"]


def test_what_is_refused():
    for count, extra in ((0, 0), (9, 0), (5, 4), (1, -1)):
        with pytest.raises(RegardError, match=f"count={count}"):
            by_cluster(torch.randn(8, 3), count, extra=extra)
