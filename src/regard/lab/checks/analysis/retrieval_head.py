"""Checks of retrieval-head."""

from __future__ import annotations

import random

import torch

from regard import models
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.heads import source
from regard.lab.verification import check
from regard.models.needles import fact, question
from regard.zoo.analysis.retrieval_head import Needle, answered, find_needle, hidden, hits, needle_recall, recall, retrieval_scores


def prompts(count: int, length: int, seed: int) -> list[Needle]:
    """Facts of five digits in source code, at depths from 5 to 95 percent; the digits are the needle."""
    draw, text, out = random.Random(seed), source(1, length * count)[0, 1:], []
    for at in range(count):
        one = fact(draw)
        hay = torch.cat((torch.tensor([0]), text[at * length : (at + 1) * length]))
        parts = (torch.tensor(list(one.text)), torch.tensor(list(question(one.name))))
        out.append(hidden(hay, *parts, 0.05 + 0.9 * at / max(1, count - 1), boundary=[10], copied=slice(-7, -2)))
    return out


@check(
    "retrieval-head",
    "planted keys: copying all 4 tokens scores 1, 2 of them 1/2, a second best key counts with topk=2, other tokens or places 0",
    below=1e-12,
    control="the mass of attention in the needle, whatever is generated",
)
def _() -> tuple[float, float]:
    prompt = Needle(torch.tensor([9, 5, 6, 7, 8, 3, 5, 6, 7, 8, 1]), 1, 5)
    answer = [5, 6, 7, 8]
    keys = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 0], [2, 1, 4, 3], [6, 7, 8, 9], [5, 5, 5, 5]])  # five heads, a key a step
    second = torch.tensor([[0] * 4, [0] * 4, [0] * 4, [0] * 4, [1, 2, 3, 4]])

    def scores(k: torch.Tensor) -> torch.Tensor:
        return sum(hits(k[:, t], token, prompt).double() / 4 for t, token in enumerate(answer))  # type: ignore[return-value]

    own = scores(keys[..., None]), scores(torch.stack((keys, second), -1))
    truth = torch.tensor([1, 0.5, 0, 0, 0], dtype=F64), torch.tensor([1, 0.5, 0, 0, 1], dtype=F64)
    mass = ((keys >= 1) & (keys < 5)).double().mean(-1)
    return max(naive.gap(a, b) for a, b in zip(own, truth, strict=True)), naive.gap(mass, truth[0])


@check(
    "retrieval-head",
    "tiny model: answer and scores equal whole passes of plain attention, step by step without a cache",
    below=1e-9,
    control="the greatest weight of the step before",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model = models.load("tiny")
    (prompt,) = prompts(1, 120, 3)
    answer, scores = answered(model, prompt, limit=5)
    plain = models.load("tiny", attn_implementation="eager")
    ids, late = prompt.ids[None], torch.zeros(4, 8, dtype=F64)
    truth, wrong = torch.zeros(4, 8, dtype=F64), 0.0
    for token in answer:
        out = plain(ids, output_attentions=True)
        wrong += int(out.logits[0, -1].argmax()) != token
        for total, row in ((truth, -1), (late, -2)):
            for layer, p in enumerate(out.attentions):
                for head in range(8):
                    at = int(p[0, head, row].argmax())
                    total[layer, head] += (prompt.start <= at < prompt.stop and int(prompt.ids[at]) == token) / 5
        ids = torch.cat((ids, torch.tensor([[token]])), 1)
    return naive.gap(torch.stack(scores), truth) + wrong, naive.gap(late, truth)


@check(
    "retrieval-head",
    "tiny model: recall of needles without the 3 heads of the greatest scores, found on other prompts (with all heads at least 0.8)",
    below=0.5,
    control="without 3 other heads, the mean of 3 draws",
)
def _() -> tuple[float, float]:
    model = models.load("tiny")
    found = retrieval_scores(model, prompts(4, 300, 0), limit=5)
    top, fresh = found.scores.top(3), prompts(4, 300, 1)
    others = [at for at in found.scores.heads if float(found.scores.scores[at]) < 0.1]
    drawn = [needle_recall(model, fresh, random.Random(seed).sample(others, 3), 5) for seed in range(3)]
    good = needle_recall(model, fresh, [], 5) >= 0.8 and found.answered >= 3
    return needle_recall(model, fresh, top, 5) if good else 1.0, sum(drawn) / 3


@check(
    "retrieval-head",
    "tiny model: share of heads that score 0.1 or more, if one scores 0.5",
    below=0.125,
    control="share of heads that look into the needle most at some step, whatever is generated",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    from regard.taps import Top, read

    model = models.load("tiny")
    examples = prompts(3, 300, 0)
    found = retrieval_scores(model, examples, limit=5).scores
    looks = torch.zeros(4, 8, dtype=torch.bool)
    for prompt in examples:
        answer, _ = answered(model, prompt, limit=5)
        with read(model, Top(1)) as seen:
            model(torch.cat((prompt.ids, torch.tensor(answer)))[None])
        for layer, (_, keys) in seen.items("top"):
            looks[layer] |= ((keys[0, :, -60:, 0] >= prompt.start) & (keys[0, :, -60:, 0] < prompt.stop)).any(-1)
    return len(found.above(0.1)) / 32 if float(found.scores.max()) >= 0.5 else 1.0, float(looks.double().mean())


@check(
    "retrieval-head",
    "recall counts each token as often as both have it; needles found by 90% of their tokens",
    below=1e-12,
    control="as sets",
)
def _() -> tuple[float, float]:
    needle, answer = [1, 1, 2, 3], [1, 2, 2, 9]
    ids = torch.tensor([7, 7, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1])
    place = find_needle(ids, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) == (2, 12) and find_needle(ids, [3, 4, 99], 0.6) == (3, 6)
    whole = hidden(torch.arange(10), torch.tensor([50, 51]), torch.tensor([60]), 0.55, boundary=[3], copied=slice(1, 2))
    there = whole.ids.tolist() == [0, 1, 2, 3, 50, 51, 4, 5, 6, 7, 8, 9, 60] and (whole.start, whole.stop) == (5, 6)
    return abs(recall(needle, answer) - 0.5) if place and there else 1.0, abs(len(set(needle) & set(answer)) / len(set(needle)) - 0.5)
