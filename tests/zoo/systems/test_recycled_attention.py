"""Recycled attention: chosen keys after an average over neighbours, of one layer by hand; batches, pieces of text, refusals."""

import pytest
import torch

pytest.importorskip("transformers")
from regard import RegardError
from regard.cache.layer import KeptLayer
from regard.cache.view import View
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.recycled_attention import RecycledAttention, recycled_mask


@pytest.mark.parametrize(("pool", "join"), [(1, "sum"), (3, "sum"), (5, "max")])
@torch.no_grad()
def test_chosen_keys_are_those_of_most_weight_around_them(pool, join):
    torch.manual_seed(0)
    model, ids = llama(layers=1, sharp=2), torch.randint(1, 50, (1, 24))
    with RecycledAttention(10, 6, join=join, pool=pool)(model) as session:
        model(ids)
        (part,) = session.cache.layers[0].parts
    model.set_attn_implementation("eager")
    p = model(ids, output_attentions=True, use_cache=False).attentions[0][0, :, -1].unflatten(0, (2, -1))  # heads of a key head together
    score = p.sum(1) if join == "sum" else p.amax(1)
    for head in range(2):
        near = torch.stack([score[head, max(0, j - pool // 2) : j + pool // 2 + 1].sum() for j in range(24)])
        chosen = set(near.topk(6).indices.tolist()) | {23}
        found = part.extract.places[0, head][part.extract.alive[0, head]].tolist()
        assert set(found) == chosen and len(found) == len(chosen)


def decoded(policy, q, k, v, prompt, hidden=()):
    """Outputs (B, H, steps, D) of the steps after a prompt, and what was read: q (B, H, L, D), k, v (B, Hkv, L, D), one layer. hidden: how many tokens
    of padding each row begins with."""
    policy.begin(1, k.shape[1])
    layer, outs = KeptLayer(), []
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, q.shape[2]))]:
        layer.update(k[:, :, start:stop], v[:, :, start:stop])
        layer.take(torch.arange(start, stop) >= torch.tensor(hidden or [0] * len(q))[:, None])
        query = q[:, :, start:stop].unflatten(1, (k.shape[1], -1))
        view = View(0, 1, start == 0, prompt, layer.parts[0], query, q.shape[-1] ** -0.5, None, layer.memory)
        outs.append(policy.compute(view, torch.arange(start, stop)).flatten(1, 2))
        policy.run(layer, 0, view)
    return torch.cat(outs[1:], 2), policy.reads[0]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("join", ["sum", "max"])
def test_rows_of_a_batch_choose_alone(every, join):
    """Full steps come at other times in each row; every row gets what it gets alone, and what is counted is the most of them."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 50, 8, dtype=torch.float64), *(torch.randn(3, 2, 50, 8, dtype=torch.float64) for _ in range(2))
    q[1, :, 31:] = q[1, :, 30:31]  # this row's query never changes
    policy = RecycledAttention(5, 6, "query_sim", 0.2, every, join, pool=3)
    found, read = decoded(policy, q, k, v, 30)
    alone = [decoded(policy, *(x[b : b + 1] for x in (q, k, v)), 30) for b in range(3)]
    torch.testing.assert_close(found, torch.cat([out for out, _ in alone]))
    assert read == [max(counts) for counts in zip(*(counts for _, counts in alone), strict=True)]
    full = [[n == 31 + t for t, n in enumerate(counts)] for _, counts in alone]
    assert sum(full[1]) == 1 and full[0] != full[2] and any(a != b for a, b in zip(full[0], full[1], strict=True))


@pytest.mark.parametrize("k", [6, 40])
def test_padding_is_never_chosen(k):
    torch.manual_seed(0)
    q, keys, v = torch.randn(2, 4, 44, 8, dtype=torch.float64), *(torch.randn(2, 2, 44, 8, dtype=torch.float64) for _ in range(2))
    keys[1, :, :20] = 50 * q[1, :2, -1:]  # padding that any step would choose
    policy = RecycledAttention(5, k, pool=3)
    found, _ = decoded(policy, q, keys, v, 30, (0, 20))
    alone, read = decoded(policy, q[1:, :, 20:], keys[1:, :, 20:], v[1:, :, 20:], 10)
    torch.testing.assert_close(found[1:], alone)
    torch.testing.assert_close(found[:1], decoded(policy, q[:1], keys[:1], v[:1], 30)[0])
    assert decoded(policy, q[1:], keys[1:], v[1:], 30, (20,))[1] == read


def test_a_second_piece_of_text_is_attended_whole_and_chooses_anew():
    """Steps are counted from the last call of more than one token."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 40, 8, dtype=torch.float64), *(torch.randn(1, 2, 40, 8, dtype=torch.float64) for _ in range(2))
    policy = RecycledAttention(4, 5)
    policy.begin(1, 2)
    layer, reads = KeptLayer(), []
    for start, stop in ((0, 20), (20, 21), (21, 22), (22, 30), *((t, t + 1) for t in range(30, 36))):
        layer.update(k[:, :, start:stop], v[:, :, start:stop])
        layer.take(torch.ones(1, stop - start, dtype=torch.bool))
        query = q[:, :, start:stop].unflatten(1, (2, -1))
        view = View(0, 1, start == 0, 20, layer.parts[0], query, 8**-0.5, None, layer.memory)
        out, places = policy.compute(view, torch.arange(start, stop)).flatten(1, 2), torch.arange(start, stop)
        if stop - start > 1:
            seen = places[:, None] >= torch.arange(stop)
            s = (q[:, :, start:stop] @ k[:, :, :stop].repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(~seen, -torch.inf)
            torch.testing.assert_close(out, s.softmax(-1) @ v[:, :, :stop].repeat_interleave(2, 1))
        policy.run(layer, 0, view)
        reads.append(len(policy.reads[0]))
    assert reads == [0, 1, 2, 2, 3, 4, 5, 6, 7, 8]
    assert [n == length for n, length in zip(policy.reads[0], (21, 22, 31, 32, 33, 34, 35, 36), strict=True)] == [
        True,
        False,
        True,
        False,
        False,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    "wrong", [{"stride": 0}, {"k": 0}, {"every": 0}, {"pool": 0}, {"pool": 2}, {"trigger": "similar"}, {"join": "mean"}]
)
def test_numbers_that_mean_nothing_are_refused(wrong):
    with pytest.raises(RegardError, match="expected positive numbers, an odd pool"):
        RecycledAttention(**wrong)
    RecycledAttention(1, 1, every=1, pool=1)


def test_masks_of_training():
    w = torch.rand(1, 2, 7, 7).tril()
    for stride, k in ((0, 2), (2, 0)):
        with pytest.raises(RegardError, match="positive numbers"):
            recycled_mask(w, stride, k)
    assert torch.equal(recycled_mask(w, 1, 1), torch.ones(1, 2, 7, 7, dtype=torch.bool).tril())  # every row is full
    assert torch.equal(recycled_mask(w, 3, 99), torch.ones(1, 2, 7, 7, dtype=torch.bool).tril())
    assert recycled_mask(w, 3, 1)[0, :, 4].sum(-1).tolist() == [1 + 1 + int(int(w[0, h, 3].argmax()) != 3) for h in range(2)]
