"""What cannot be scored is refused."""

import pytest
import torch

import regard
from regard.zoo.analysis.retrieval_head import (
    Needle,
    RetrievalHeads,
    answered,
    find_needle,
    hidden,
    hits,
    recall,
    retrieval_scores,
)


def test_retrieval_refuses_what_it_cannot_score():
    model = regard.models.load("tiny")
    with pytest.raises(regard.RegardError, match="answered none of 1 prompts"):
        retrieval_scores(model, [Needle(torch.arange(1, 20), 3, 8)], limit=3)
    with pytest.raises(regard.RegardError, match="topk"):
        retrieval_scores(model, [], topk=0)
    with pytest.raises(regard.RegardError, match="depth"):
        hidden(torch.arange(3), torch.arange(2), torch.arange(2), 1.5)
    with pytest.raises(regard.RegardError, match="nowhere"):
        find_needle(torch.arange(5), [7, 8])


def test_a_needle_is_found_by_most_of_its_different_tokens():
    ids = torch.tensor([1, 2, 3, 9, 5, 6, 7, 8])
    assert find_needle(ids, [3, 4, 5, 6], 0.7) == (2, 6) and find_needle(ids, [3, 9, 5, 6]) == (2, 6)
    with pytest.raises(regard.RegardError, match="over 90%"):
        find_needle(ids, [3, 4, 5, 6])
    with pytest.raises(regard.RegardError, match="nowhere"):
        find_needle(ids, [3, 4, 5, 6], 0.75)  # three of four are not more than that
    assert find_needle(torch.tensor([1, 5, 5, 7]), [5, 5], 0.9) == (0, 2)


def test_where_a_needle_is_put():
    hay, needle, ask = torch.arange(10), torch.tensor([70, 71, 72]), torch.tensor([90])
    for depth, at in ((0.0, 0), (0.5, 5), (0.46, 5), (1.0, 10)):
        found = hidden(hay, needle, ask, depth)
        assert (found.start, found.stop) == (at, at + 3) and found.needle == [70, 71, 72]
        assert found.ids.tolist() == [*range(at), 70, 71, 72, *range(at, 10), 90]
    assert hidden(hay, needle, ask, 0.5, boundary=(1, 3)).start == 4 and hidden(hay, needle, ask, 0.2, boundary=(5,)).start == 0
    assert hidden(hay, needle, ask, 1.0, boundary=(5,)).start == 10
    part = hidden(hay, needle, ask, 0.5, copied=slice(1, None))
    assert (part.start, part.stop, part.needle) == (6, 8, [71, 72])


def test_keys_that_hit_and_recall():
    prompt = Needle(torch.tensor([4, 7, 8, 7, 5]), 1, 3)
    keys = torch.tensor([[0, 1], [2, 4], [3, 3], [1, 1]])
    assert hits(keys, 7, prompt).tolist() == [True, False, False, True] and hits(keys, 8, prompt).tolist() == [False, True, False, False]
    assert recall([1, 2, 2, 3], [2, 3, 3, 9]) == 0.5 and recall([1], []) == 0
    table = regard.interpret.tables.table_of(torch.zeros(1, 2), "")
    assert RetrievalHeads(table, table, (0.2, 0.5, 0.6), 0.5).answered == 1


def test_prompts_count_by_their_recall_and_heads_by_their_score():
    pytest.importorskip("transformers")
    from regard.lab.checks.shared.decoding import llama

    model, prompts = llama(sharp=3), []
    for seed in range(6):
        ids = torch.randint(1, 50, (12,), generator=torch.Generator().manual_seed(seed))
        answer = model.generate(ids[None], max_new_tokens=4, do_sample=False)[0, 12:]
        ids[3:7] = answer  # most needles are answered in part
        prompts.append(Needle(ids, 3, 7))
    every = [answered(model, prompt, 2, 4) for prompt in prompts]
    recalls = [recall(prompt.needle, answer) for prompt, (answer, _) in zip(prompts, every, strict=True)]
    assert all(len(answer) == 4 for answer, _ in every) and max(recalls) > 0
    for least in (-1.0, sorted(recalls)[3]):
        kept = [scores for r, (_, scores) in zip(recalls, every, strict=True) if r > least]
        if not kept:
            continue
        found = retrieval_scores(model, prompts, topk=2, limit=4, least=least, active=0.3)
        for layer in range(2):
            rows = torch.stack([scores[layer] for scores in kept])
            assert torch.allclose(found.scores.scores[layer], rows.mean(0))
            assert torch.allclose(found.active.scores[layer], (rows > 0.3).double().mean(0))
        assert found.recalls == tuple(recalls) and found.answered == len(kept)
    stop = answered(model, prompts[0], 1, 4)[0][1]
    assert len(answered(model, prompts[0], 1, 4, [stop])[0]) <= 2
