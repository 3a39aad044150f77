"""PrFlashAttention's parts: bad input, packed documents, caches that quantise, and what is fitted."""

import itertools
import math

import pytest
import torch

import regard
from regard import Causal, RegardError
from regard.algebra import Harmonic, Modified, Rope, Segments, Weighted
from regard.cache import Staircase
from regard.cache.staircase import quantised
from regard.lab.checks.shared.decoding import llama
from regard.search import Choice, Normal, cross_entropy
from regard.tasks.subwords import Subwords, fitted, learn_subwords
from regard.zoo.analysis.prflash_saq import expected_density


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    "options", [{"block_size": 0}, {"law": "linear"}, {"c": 0.0}, {"c": 1.1, "law": "geometric"}, {"c": float("nan")}, {"position": "both"}]
)
def test_hyperparameters_are_checked(options):
    with pytest.raises(RegardError):
        regard.get("prflash-saq", **options)


def test_draws_of_another_shape_are_refused():
    x = drawn(1, 2, 20, 4)
    with pytest.raises(RegardError, match="draws"):
        regard.attend(x, x, x, regard.get("prflash-saq", block_size=4), draws=torch.rand(2, 4, 4))


def test_heads_share_their_lots_on_request():
    x, one = drawn(1, 1, 40, 4).expand(1, 4, -1, -1), regard.get("prflash-saq", block_size=4, per_head=False)
    out = regard.attend(x, x, x, one)
    assert torch.equal(out[:, :1].expand_as(out), out)
    own = regard.attend(x, x, x, regard.get("prflash-saq", block_size=4))
    assert not torch.allclose(own[:, 0], own[:, 1])


@pytest.mark.parametrize("unbiased", [False, True])
def test_packed_documents_draw_by_themselves(unbiased):
    one = regard.get("prflash-saq", block_size=4, unbiased=unbiased, position="additive")
    q, k, v = (drawn(1, 2, 30, 4) for _ in range(3))
    segments = torch.tensor([[0] * 11 + [1] * 19])
    whole = regard.attend(q, k, v, one, mask=Segments(), segments=segments)
    parts = [regard.attend(q[:, :, at], k[:, :, at], v[:, :, at], one) for at in (slice(0, 11), slice(11, 30))]
    assert torch.allclose(whole, torch.cat(parts, 2), atol=1e-12)


def test_lots_of_another_seed_are_others():
    q, k, v = (drawn(1, 2, 40, 4) for _ in range(3))
    outs = [regard.attend(q, k, v, regard.get("prflash-saq", block_size=4, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])


def test_harmonic_knows_its_ways_and_works_in_every_executor():
    with pytest.raises(RegardError, match="additive"):
        Harmonic("linear")
    q, k, v = (torch.randn(1, 2, 60, 8) for _ in range(3))
    for way in ("additive", "multiplicative"):
        outs = [regard.attend(q, k, v, Weighted(position=Harmonic(way)), mask=Causal(), executor=e) for e in (None, "tiled", "reference")]
        assert all(torch.allclose(out, outs[-1], atol=1e-6) for out in outs)


def test_indices_are_divided_in_the_dtype_they_are_cast_to():
    q, k, v = (drawn(1, 2, 60, 8) for _ in range(3))
    s, away = q @ k.mT * 8**-0.5, (torch.arange(60)[:, None] - torch.arange(60)).abs().double()
    divided = regard.attend(q, k, v, Weighted(position=Modified(lambda s, i, j: s + 1 / (1 + (i - j).abs().type_as(s)))), executor="tiled")
    logs = regard.attend(q, k, v, Weighted(position=Modified(lambda s, i, j: s - torch.log1p((i - j).abs().type_as(s)))), executor="tiled")
    for out, truth in ((divided, s + 1 / (1 + away)), (logs, s - away.log1p())):
        assert float((out - truth.softmax(-1) @ v).abs().max()) < 1e-13


@pytest.mark.parametrize(
    "options",
    [
        {"bits": (8, 4), "edges": (3,)},
        {"bits": (16, 4, 8), "edges": (3, 5)},
        {"bits": (16, 3), "edges": (3,)},
        {"bits": (16, 8, 4), "edges": (5, 5)},
        {"edges": (3,)},
        {"edges": (-1, 3, 4)},
        {"group": 0},
    ],
)
def test_stairs_are_checked(options):
    with pytest.raises(RegardError, match="bits="):
        Staircase(**options)


def test_codes_of_one_number_and_odd_widths():
    x = torch.cat((torch.full((1, 1, 2, 4, 7), 3.25), torch.randn(1, 1, 2, 4, 7)), 2)
    for bits in (1, 2, 4, 8):
        found = quantised(x, bits, 3)
        assert found.codes.dtype == torch.uint8 and found.codes.shape[-1] == -(-7 * bits // 8)
        back = found.restored()
        assert torch.equal(back[:, :, :2], x[:, :, :2]) and bool(((back - x).abs() <= found.step / 2 + 1e-6).all())


def test_sixteen_bits_alone_change_nothing_and_generation_runs():
    torch.manual_seed(0)
    model, ids = llama(layers=2, kv_heads=1), torch.randint(1, 50, (2, 21))
    options = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(ids, **options)
    with Staircase((16,), ())(model):
        assert torch.equal(model.generate(ids, **options), plain)
    policy = Staircase(edges=(4, 8, 16), group=4)
    with policy(model) as session:
        lower = model.generate(ids, num_beams=2, **options)
    assert lower.shape == plain.shape and 0 < policy.held(session.cache) < Staircase.held(session.cache) + 1
    assert torch.equal(model.generate(ids, **options), plain)


def test_half_precision_keeps_half_precision():
    torch.manual_seed(0)
    model, ids = llama(layers=1, kv_heads=1).to(torch.bfloat16), torch.randint(1, 50, (1, 30))
    with Staircase(edges=(4, 8, 16), group=4)(model), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        out = model(ids[:, :1], past_key_values=cache).logits
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())


def test_padding_and_groups_that_do_not_divide_are_refused():
    model, ids = llama(layers=1), torch.randint(1, 50, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with Staircase(edges=(2, 4, 8), group=2)(model), torch.no_grad(), pytest.raises(RegardError, match="padding"):
        model(ids, attention_mask=mask)
    with Staircase(edges=(2, 4, 8), group=3)(model), torch.no_grad(), pytest.raises(RegardError, match="divides"):
        model(ids)


def test_subwords_refuse_what_they_cannot_cut_or_learn():
    model = Subwords({"a": -1.0, "ab": -1.5, "b": -1.0})
    assert model.segment("") == [] and model.segment("aab") == ["a", "ab"]
    with pytest.raises(RegardError, match="'ac'"):
        model.segment("ac")
    for bad in ({"words": {}, "size": 5}, {"words": {"abc": 1}, "size": 2}, {"words": {"abc": 0}, "size": 9}):
        with pytest.raises(RegardError, match="size="):
            learn_subwords(**bad)


def test_fitting_a_vocabulary_never_makes_words_less_likely():
    words = {"banana": 3, "bandana": 2, "ananas": 4, "nab": 1}
    vocabulary = dict.fromkeys([*"bands", "an", "ana", "ban", "nan"], 1.0)
    values = [fitted(words, vocabulary, rounds).corpus(words) for rounds in (1, 2, 4, 8)]
    assert all(b >= a - 1.0 for a, b in itertools.pairwise(values)) and values[-1] > values[0] - 1e-9


def test_cross_entropy_refits_as_its_formula_says():
    tried, space = [], {"n": Normal(5.0, 3.0, 0, 20, whole=True), "how": Choice(("a", "b"))}

    def cost(x):
        return abs(x["n"] - 7) + (x["how"] != "b")

    found = cross_entropy(lambda x: tried.append(x) or cost(x), space, samples=20, rounds=2)
    best = sorted(tried[:20], key=cost)[:2]
    mean = sum(x["n"] for x in best) / 2
    std = (sum((x["n"] - mean) ** 2 for x in best) / 2) ** 0.5
    now = cross_entropy(cost, space, samples=20, rounds=1).space
    shares = tuple(0.7 * sum(x["how"] == option for x in best) / 2 + 0.15 for option in "ab")
    assert (now["n"].mean, now["n"].std) == pytest.approx((0.7 * mean + 1.5, 0.7 * std + 0.9)) and now["how"].shares == pytest.approx(
        shares
    )
    assert len(tried) == 40 and found.value <= 1 and all(isinstance(x["n"], int) and 0 <= x["n"] <= 20 for x in tried)
    assert len(found.thresholds) == 2


def test_cross_entropy_stops_and_refuses():
    found = cross_entropy(lambda x: 1.0, {"n": Normal(0.0, 1.0, log=True, low=0.5)}, samples=5, patience=3)
    assert len(found.thresholds) == 4 and found.settings["n"] >= 0.5
    with pytest.raises(RegardError, match="NaN"):
        cross_entropy(lambda x: float("nan"), {"n": Normal(0.0, 1.0)})
    with pytest.raises(RegardError, match="elite"):
        cross_entropy(lambda x: 0.0, {"n": Normal(0.0, 1.0)}, elite=0.0)


@pytest.mark.parametrize(("law", "c"), [("harmonic", 1.0), ("harmonic", 3.0), ("geometric", 0.6)])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("position", [None, "additive", "multiplicative"])
def test_blocks_are_kept_by_lots_below_their_chance(law, c, unbiased, position):
    """The whole formula in loops, with lots that are given."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 4, dtype=torch.float64) for _ in range(3))
    lots = torch.rand(2, 4, 4)
    own = regard.get("prflash-saq", block_size=3, law=law, c=c, unbiased=unbiased, position=position)
    found = regard.attend(q, k, v, own, draws=lots)
    harmonic = [sum(1 / (n + 1) for n in range(d)) for d in range(13)]
    turn = Rope()
    qs, ks = (turn.rotate(x, torch.arange(12)) if position else x for x in (q, k))
    slopes = [2 ** (-8 * (h + 1) / 2) for h in range(2)]
    for h in range(2):
        for i in range(12):
            s, kept = [], []
            for j in range(i + 1):
                d = i // 3 - j // 3
                p = min(1.0, c / (d + 1)) if law == "harmonic" else c**d
                if d and float(lots[h, i // 3, j // 3]) >= p:
                    continue
                own = float(qs[0, h, i] @ ks[0, h, j]) / 2
                if position == "additive":
                    own -= slopes[h] * harmonic[i - j]
                elif position == "multiplicative":
                    own /= 1 + i - j
                s.append(own - (math.log(p) if unbiased else 0.0))
                kept.append(j)
            assert torch.allclose(found[0, h, i], torch.tensor(s, dtype=torch.float64).softmax(0) @ v[0, h, kept], atol=1e-9), (h, i)


def test_density_by_hand():
    for law, c, p in (("harmonic", 2.0, lambda d: min(1, 2 / (d + 1))), ("geometric", 0.5, lambda d: 0.5**d)):
        pairs = [p(a - b) for a in range(7) for b in range(a + 1)]
        assert expected_density(7, law, c) == pytest.approx(sum(pairs) / len(pairs))
    assert expected_density(9) == expected_density(9, "harmonic", 1.0)
