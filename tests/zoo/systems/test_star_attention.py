"""Star Attention: blocks behind their anchor, shares of hosts, answers step by step, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import regard
from regard.nn.decoder import Decoder
from regard.zoo.systems.star_attention import StarState, encode, joined, star_decode, star_mask, star_prefill


def small() -> Decoder:
    return Decoder(vocab=20, dim=16, layers=2, heads=4, kv_heads=2).double().eval()


@pytest.mark.parametrize("anchor", [None, 0, 2, 4])
def test_the_mask(anchor: int | None) -> None:
    ones = torch.ones(1, 1, 11, 1, dtype=torch.float64)
    eye = torch.eye(11, dtype=torch.float64)[None, None]
    found = regard.attend(ones, ones, eye, mask=star_mask(4) if anchor is None else star_mask(4, anchor))[0, 0] > 0
    reach = 4 if anchor is None else anchor
    assert found.tolist() == [[j <= i and (i // 4 == j // 4 or j < reach) for j in range(11)] for i in range(11)]


@torch.no_grad()
def test_the_first_phase_keeps_each_block_at_its_true_positions() -> None:
    model, ids = small(), torch.randint(20, (2, 11))
    state = star_prefill(model, ids, 4, 2, hosts=2)
    assert state.length == 11 and state.sent == 0 and state.last == 1 and sorted(state.shards) == [0, 1]
    assert [state.shards[h][0][0].shape[2] for h in (0, 1)] == [8, 3]
    for block, start in enumerate((0, 4, 8)):
        own = ids[:, start : start + 4]
        head = ids[:, :2] if start else ids[:, :0]
        places = torch.cat((torch.arange(head.shape[1]), torch.arange(start, start + own.shape[1])))
        pairs = encode(model, torch.cat((head, own), 1), places)
        for layer in range(2):
            for at in range(2):
                kept = torch.cat([state.shards[h][layer][at] for h in (0, 1)], 2)
                torch.testing.assert_close(kept[:, :, start : start + own.shape[1]], pairs[layer][at][:, :, head.shape[1] :])
        assert block == start // 4


@torch.no_grad()
def test_queries_read_all_that_is_kept_and_answers_go_on() -> None:
    """One block of the whole context is full attention, on any number of hosts."""
    model, ids = small(), torch.randint(20, (2, 15))
    truth = model(ids)
    for hosts in (1, 3):
        state = star_prefill(model, ids[:, :10], 10, hosts=hosts)
        outs = [star_decode(state, ids[:, a:b]) for a, b in ((10, 12), (12, 13), (13, 15))]
        torch.testing.assert_close(torch.cat(outs, 1), truth[:, 10:])
        assert state.length == 15 and state.sent == 2 * (2 + 1 + 2) * 2 * 4 * (4 + 1)
    default = star_prefill(model, ids[:, :10], 3)
    wanted = star_prefill(model, ids[:, :10], 3, anchor=3, hosts=1)
    for ours, theirs in zip(kept(default), kept(wanted), strict=True):
        assert torch.equal(ours, theirs)


def kept(state: StarState) -> list[Tensor]:
    return [x for layers in state.shards.values() for pair in layers for x in pair]


def test_parts_are_joined_by_their_log_sums() -> None:
    s, v = torch.randn(3, 9, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    cuts = [slice(0, 2), slice(2, 7), slice(7, 9)]
    parts = [torch.cat((s[:, c].softmax(-1) @ v[c], torch.logsumexp(s[:, c], -1, keepdim=True)), -1) for c in cuts]
    torch.testing.assert_close(joined(parts), s.softmax(-1) @ v)
    nothing = torch.cat((torch.zeros(3, 4), torch.full((3, 1), -torch.inf)), -1).double()
    torch.testing.assert_close(joined([*parts, nothing]), s.softmax(-1) @ v)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: star_prefill(small(), torch.zeros(1, 4, dtype=torch.long), 0), "block=0"),
        (lambda: star_prefill(small(), torch.zeros(1, 4, dtype=torch.long), 2, 3), "anchor <= block"),
        (lambda: star_prefill(small(), torch.zeros(1, 4, dtype=torch.long), 2, -1), "0 <= anchor"),
        (lambda: star_prefill(small(), torch.zeros(4, dtype=torch.long), 2), r"ids \(B, L\)"),
        (lambda: star_prefill(small(), torch.zeros(1, 0, dtype=torch.long), 2), r"ids \(B, L\)"),
        (
            lambda: star_prefill(Decoder("sigmoid", vocab=20, dim=16, layers=1), torch.zeros(1, 4, dtype=torch.long), 2),
            "full softmax attention",
        ),
        (
            lambda: star_prefill(Decoder("mega", vocab=20, dim=16, layers=1), torch.zeros(1, 4, dtype=torch.long), 2),
            "full softmax attention",
        ),
    ],
)
def test_says_what_is_wrong(make: object, words: str) -> None:
    with pytest.raises(regard.RegardError, match=words):
        make()  # type: ignore[operator]
    star_prefill(small(), torch.zeros(1, 4, dtype=torch.long), 1, 1)
