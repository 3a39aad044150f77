"""Monotone alignments by enumeration: likelihoods, best paths, contexts of every kind, decoding, the stretched task."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard import RegardError
from regard.zoo.softmax.latent_monotonic_attention import (
    MonotonicDecoder,
    full_sum,
    jump_scores,
    linear_alignment,
    sample_positions,
    stretched,
    viterbi,
)

FRAMES, LABELS = 6, 3


def made(context: str, **options: int) -> tuple[MonotonicDecoder, Tensor, Tensor]:
    model = MonotonicDecoder(4, 5, 8, context, **options).double()
    return model, torch.randn(2, FRAMES, 4, dtype=torch.float64), torch.randint(5, (2, LABELS))


def context_of(model: MonotonicDecoder, h: Tensor, before: int, at: int) -> Tensor:
    width = model.width
    span = {"hard": (at, at + 1), "window": (at - width, at + width + 1), "segment": (before + 1, at + 1), "global": (0, FRAMES)}[
        model.context
    ]
    near = h[max(span[0], 0) : min(span[1], FRAMES)]
    return (near @ model.energy.weight[0]).softmax(0) @ near


def path_of(model: MonotonicDecoder, h: Tensor, u: Tensor, y: list[int], path: tuple[int, ...]) -> Tensor:
    """log p(y, path)."""
    total, last = torch.zeros((), dtype=torch.float64), -1
    first, _, second = model.label
    for s, t in enumerate(path):
        total = total + u[t].sigmoid().log() + sum((1 - u[i].sigmoid()).log() for i in range(last + 1, t))
        hidden = (context_of(model, h, last, t) @ first.weight.T + first.bias).clamp_min(0)  # type: ignore[operator, union-attr]
        total = total + (hidden @ second.weight.T + second.bias).log_softmax(-1)[y[s]]  # type: ignore[operator, union-attr]
        last = t
    return total


@pytest.mark.parametrize("context", ["hard", "window", "segment", "global"])
def test_likelihoods_and_alignments(context: str) -> None:
    model, x, y = made(context, width=1)
    h, u = model.encode(x)
    torch.testing.assert_close(u, (h @ model.stop.weight[0]) + model.stop.bias)
    paths = list(itertools.combinations(range(FRAMES), LABELS))
    for b in range(2):
        each = torch.stack([path_of(model, h[b], u[b], y[b].tolist(), path) for path in paths])
        torch.testing.assert_close(model(x, y)[b], torch.logsumexp(each, 0))
        assert tuple(model.align(x, y)[b].tolist()) == paths[int(each.argmax())]
        for n in (0, 7, 19):
            given = torch.tensor([paths[n]] * 2)
            torch.testing.assert_close(model(x, y, given)[b], each[n])
    assert bool(model(x, y).isfinite().all())


def test_the_encoder_sees_two_frames_on_each_side() -> None:
    model, x, _ = made("hard")
    h, _ = model.encode(x)
    first, _, second = model.encoder
    for t in range(FRAMES):
        near = []
        for s in (t - 1, t, t + 1):
            inside = [x[0, i] if 0 <= i < FRAMES else torch.zeros(4, dtype=torch.float64) for i in (s - 1, s, s + 1)]
            hidden = torch.einsum("ocw,wc->o", first.weight, torch.stack(inside)) + first.bias
            near.append(hidden.clamp_min(0) if 0 <= s < FRAMES else torch.zeros(8, dtype=torch.float64))
        torch.testing.assert_close(h[0, t], torch.einsum("ocw,wc->o", second.weight, torch.stack(near)) + second.bias)


def test_sums_and_best_paths_of_given_scores() -> None:
    u, labels = torch.randn(2, FRAMES, dtype=torch.float64), torch.randn(2, LABELS, FRAMES + 1, FRAMES, dtype=torch.float64)
    jumps = jump_scores(u)
    for b in range(2):
        scores = {}
        for path in itertools.combinations(range(FRAMES), LABELS):
            total, last = 0.0, -1
            for s, t in enumerate(path):
                total += math.log(float(u[b, t].sigmoid())) + sum(math.log(1 - float(u[b, i].sigmoid())) for i in range(last + 1, t))
                total += float(labels[b, s, last + 1, t])
                last = t
            scores[path] = total
        torch.testing.assert_close(full_sum(jumps, labels)[b], torch.logsumexp(torch.tensor(list(scores.values()), dtype=torch.float64), 0))
        path, value = viterbi(jumps, labels)
        assert tuple(path[b].tolist()) == max(scores, key=lambda one: scores[one]) and float(value[b]) == pytest.approx(
            max(scores.values())
        )
    leaf = u.clone().requires_grad_()
    full_sum(jump_scores(leaf), labels[:, :, 0]).sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())


def test_drawn_positions() -> None:
    """Three of four frames in order: the chances of the four paths, given that all three find room."""
    u = torch.tensor([0.4, -0.3, 0.8, 0.1])
    p = u.sigmoid().tolist()
    drawn = sample_positions(u.expand(40000, -1), 3, torch.Generator().manual_seed(0))
    want: dict[tuple[int, ...], float] = {}
    for path in itertools.combinations(range(4), 3):
        chance, last = 1.0, -1
        for s, t in enumerate(path):
            reachable = range(last + 1, 2 + s)
            weights = [p[i] * math.prod(1 - p[j] for j in range(last + 1, i)) for i in reachable]
            chance *= weights[t - last - 1] / sum(weights)
            last = t
        want[path] = chance
    assert sum(want.values()) == pytest.approx(1.0)
    for path, chance in want.items():
        assert float((drawn == torch.tensor(path)).all(-1).double().mean()) == pytest.approx(chance, abs=0.015)
    assert bool((sample_positions(torch.randn(50, 9), 9) == torch.arange(9)).all())


@pytest.mark.parametrize("context", ["hard", "window", "segment", "global"])
def test_decoding_by_a_wide_beam_is_exhaustive(context: str) -> None:
    model, x, _ = made(context, width=1)
    h, u = model.encode(x)
    labels, places = model.decode(x, 2, beam=1000)
    for b in range(2):
        best = max(
            (
                (float(path_of(model, h[b], u[b], list(y), path).detach()), y, path)
                for path in itertools.combinations(range(FRAMES), 2)
                for y in itertools.product(range(5), repeat=2)
            ),
        )
        assert tuple(labels[b].tolist()) == best[1] and tuple(places[b].tolist()) == best[2]
    narrow = model.decode(x, 4)
    assert narrow[0].shape == narrow[1].shape == (2, 4) and bool((narrow[1].diff(dim=-1) > 0).all()) and int(narrow[1].max()) < FRAMES
    assert torch.equal(narrow[1], model.decode(x, 4, beam=4)[1]) and bool((model.decode(x, FRAMES)[1] == torch.arange(FRAMES)).all())


def test_where_training_starts() -> None:
    assert linear_alignment(4, 20, 2).tolist() == [[4, 9, 14, 19]] * 2
    assert linear_alignment(3, 7, 1).tolist() == [[1, 4, 6]]


def test_the_stretched_task() -> None:
    x, y, ends = stretched(200, symbols=4, labels=3, least=2, most=4, noise=0.0)
    assert x.shape == (200, 12, 5) and y.shape == ends.shape == (200, 3) and int(y.max()) == 3 and int(y.min()) == 0
    assert bool((y[:, 1:] != y[:, :-1]).all())
    lengths = F.pad(ends + 1, (1, 0)).diff(dim=-1)
    assert set(lengths.flatten().tolist()) == {2, 3, 4}
    for one, labels, last in zip(x, y.tolist(), ends.tolist(), strict=True):
        frames = one.argmax(-1).tolist()
        want = [label for n, label in enumerate(labels) for _ in range(last[n] - (last[n - 1] if n else -1))]
        assert frames == want + [4] * (12 - len(want)) and bool((one.sum(-1) == 1).all())
    noisy, *_ = stretched(200, symbols=4, labels=3, least=2, most=4)
    assert float((noisy - x).std()) == pytest.approx(0.2, rel=0.05)
    assert stretched(3)[0].shape == (3, 20, 6) and torch.equal(stretched(3)[0], stretched(3, seed=0)[0])
    assert (
        not torch.equal(stretched(3)[0], stretched(3, seed=1)[0])
        and int(stretched(300)[2][:, 0].min()) == 1
        and int(stretched(300)[2][:, 0].max()) == 4
    )


def test_defaults_and_refusals() -> None:
    model = MonotonicDecoder(4, 5)
    assert model.context == "segment" and model.width == 5 and model.stop.in_features == 64
    with pytest.raises(RegardError, match="hard, window, segment or global"):
        MonotonicDecoder(4, 5, context="soft")
