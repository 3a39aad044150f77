"""Readings, losses, decoding, refusals and edges of captions by attention."""

import math

import pytest
import torch

from regard import RegardError
from regard.generate.beams import Beam, beam_search
from regard.nn.additive import AdditiveAttention, HardAttention
from regard.nn.reading_lstm import thinned
from regard.tasks.images import listed_glyphs
from regard.zoo.vision.show_attend_tell import CaptionDecoder, HardLoss, Told, attention_maps, caption_loss, doubly_stochastic

SIZES = {"vocab": 7, "features": 5, "hidden": 4, "embed": 3}


def scattered(layer):
    torch.manual_seed(1)
    for p in layer.double().parameters():
        p.data.add_(torch.randn_like(p))
    return layer


def given(count=2, places=6, length=4):
    torch.manual_seed(2)
    return torch.randn(count, places, 5, dtype=torch.float64), torch.randint(1, 7, (count, length))


def test_glyphs_stand_where_they_are_listed():
    x, words, cells = listed_glyphs(50, torch.Generator().manual_seed(0), grid=3, glyphs=2, size=2, noise=0.0)
    assert x.shape == (50, 1, 6, 6) and (cells[:, 0] < cells[:, 1]).all() and (words[:, 0] != words[:, 1]).all()
    assert int(words.min()) == 1 and int(words.max()) == 6
    strokes = {}
    for image, told, at in zip(x[:, 0], words.tolist(), cells.tolist(), strict=True):
        assert int(image.count_nonzero()) == 8
        for word, cell in zip(told, at, strict=True):
            found = image[cell // 3 * 2 : cell // 3 * 2 + 2, cell % 3 * 2 : cell % 3 * 2 + 2]
            assert torch.equal(strokes.setdefault(word, found), found)
    with pytest.raises(RegardError, match="glyphs=9"):
        listed_glyphs(1, torch.Generator(), glyphs=9)


def test_first_values():
    torch.manual_seed(0)
    d = CaptionDecoder(50, features=64, hidden=64, embed=32, selector=True, deep_attention=2, deep_start=2, deep_readout=2)
    square = [
        d.cells[0].start_hidden,
        d.cells[0].start_memory,
        d.start_deep[0],
        d.tell_deep[0],
        d.cells[0].attention.query,
        d.cells[0].attention.deep[0],
    ]
    square = [layer.weight for layer in square] + list(d.cells[0].recur.weight.chunk(4))
    for w in square:
        assert torch.allclose(w @ w.T, torch.eye(len(w)), atol=1e-5)
    for layer in (d.words, d.cells[0].feed, d.cells[0].see, d.tell, d.tell_context, d.out, d.cells[0].attention.key):
        assert float(layer.weight.std()) == pytest.approx(0.01, rel=0.1)
    assert all(float(p.detach().abs().max()) == 0 for name, p in d.named_parameters() if name.endswith("bias"))
    assert float(CaptionDecoder(50, std=0.2).words.weight.std()) == pytest.approx(0.2, rel=0.1)
    assert CaptionDecoder(50).cells[0].recur.weight.shape == (4000, 1000) and CaptionDecoder(50).cells[0].see.weight.shape == (4000, 512)
    same = CaptionDecoder(50, features=8, hidden=32, embed=32)
    assert all(torch.allclose(w @ w.T, torch.eye(32), atol=1e-5) for w in same.cells[0].feed.weight.chunk(4))


def test_hard_attention_reads_one_place():
    a, _ = given()
    layer, h = scattered(HardAttention(5, 4, reads="argmax")), torch.randn(2, 4, dtype=torch.float64)
    soft = AdditiveAttention(5, 4).double()
    soft.load_state_dict(layer.state_dict())
    out = layer.eval()(h, a)
    best = out.log_weights.argmax(-1)
    assert torch.equal(out.pick, best) and torch.equal(out.context, a[torch.arange(2), best])
    layer.reads = "expectation"
    assert layer(h, a).pick is None and torch.equal(layer(h, a).context, soft(h, a).context)
    assert torch.equal(layer.train()(h, a, expected=True).context, soft(h, a).context)
    layer.reads = "sample"
    for mode in (layer.eval(), layer.train()):
        picks = mode(h[:1].expand(4000, -1), a[:1].expand(4000, -1, -1)).pick
        share = torch.bincount(picks, minlength=6) / 4000
        assert float((share - mode(h, a).log_weights[0].exp()).abs().max()) < 0.04


def test_one_coin_a_call_decides_between_samples_and_expectations():
    a, words = given()
    torch.manual_seed(0)
    d = CaptionDecoder(**SIZES, attention="hard", sampled=0.25).double().train()
    share = sum(d(a, words).picks is not None for _ in range(400)) / 400
    assert 0.17 < share < 0.33
    assert d.eval()(a, words).picks is None and CaptionDecoder(**SIZES).double().train()(a, words).picks is None


@pytest.mark.parametrize("form", [{}, {"attention": "hard"}, {"layers": 3, "around": True}])
def test_padded_words_change_nothing(form):
    d = scattered(CaptionDecoder(**SIZES, **form)).eval()
    a, words = given()
    keep = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    junk = torch.where(keep, words, -100)
    whole, short = d(a, junk, keep), d(a[1:], words[1:, :2])
    assert torch.allclose(whole.logits[1, :2], short.logits[0]) and torch.allclose(whole.logits[0], d(a[:1], words[:1]).logits[0])
    first = torch.tensor([[0, 1, 1, 1]], dtype=torch.bool)  # padding on the left: the state stands still over it
    moved = d(a[:1], torch.cat((torch.tensor([[0]]), words[:1, :3]), 1), first)
    seen = d.looked_over(a[:1])
    again = d.step(torch.tensor([0]), d.start(seen), seen)[0]
    assert torch.allclose(moved.logits[0, 1], again[0])
    each = sum(caption_loss(d(a[b : b + 1], words[b : b + 1, :n]), words[b : b + 1, :n], penalty=0.3) for b, n in ((0, 4), (1, 2))) / 2
    assert torch.allclose(caption_loss(whole, junk, keep, 0.3), each)
    assert torch.allclose(
        HardLoss(baseline=False)(whole, junk, keep),
        sum(HardLoss(baseline=False)(d(a[b : b + 1], words[b : b + 1, :n]), words[b : b + 1, :n]) for b, n in ((0, 4), (1, 2))) / 2,
    )


def test_losses_by_hand():
    torch.manual_seed(3)
    logits, scores = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    words, picks = torch.randint(4, (2, 3)), torch.randint(5, (2, 3))
    logits[0, 0, words[0, 0]] = -60.0  # a word of almost no probability meets the floor
    log_w = scores.log_softmax(-1).requires_grad_()
    told = Told(logits, log_w.exp(), log_w, picks)
    log_p = torch.tensor([sum(math.log(float(logits[b, t].softmax(-1)[words[b, t]]) + 1e-8) for t in range(3)) for b in range(2)]).double()
    penalty = sum((1 - sum(float(told.weights[b, t, i]) for t in range(3))) ** 2 for b in range(2) for i in range(5)) / 2
    assert float(doubly_stochastic(told.weights)) == pytest.approx(penalty)
    assert float(caption_loss(told, words)) == pytest.approx(float(-log_p.mean()) + penalty)
    assert float(caption_loss(told, words, penalty=0.0, floor=0.0)) > float(caption_loss(told, words, penalty=0.0)) + 20
    loss = HardLoss(reward=0.5, entropy=0.1, decay=0.8).double()
    loss.average.fill_(-3.0)
    grad = torch.autograd.grad(loss(told, words), log_w)[0]
    expected = torch.zeros_like(grad)
    for b in range(2):
        for t in range(3):
            expected[b, t, picks[b, t]] -= 0.5 * (log_p[b] + 3.0) / 2
            for i in range(5):  # d of -w log w, where w = exp(log w)
                expected[b, t, i] += 0.1 * float(told.weights[b, t, i] * (log_w[b, t, i] + 1)) / 2
    assert torch.allclose(grad, expected)
    assert float(loss.average) == pytest.approx(0.8 * -3 + 0.2 * float(log_p.mean()))
    loss.eval()(told, words)
    assert float(loss.average) == pytest.approx(0.8 * -3 + 0.2 * float(log_p.mean()))
    assert "average" in loss.state_dict() and float(HardLoss().average) == 0
    read = HardLoss(entropy=0.0)(told._replace(picks=None), words)
    assert float(read.detach()) == pytest.approx(float(-log_p.mean()))


def test_dropout_is_not_rescaled():
    a, words = given()
    for option, layers in (("dropout", {"deep_start": 2, "deep_readout": 2}), ("gate_dropout", {})):
        plain, other = (scattered(CaptionDecoder(**SIZES, **layers, **extra)) for extra in ({}, {option: 0.4}))
        assert torch.equal(plain.train()(a, words).logits, plain.eval()(a, words).logits)
        assert not torch.equal(other.train()(a, words).logits, other(a, words).logits)
        assert torch.equal(other.eval()(a, words).logits, other(a, words).logits)
        x = thinned(torch.ones(4000), 0.4, True)
        assert set(x.unique().tolist()) == {0.0, 1.0} and 0.55 < float(x.mean()) < 0.65
        assert torch.allclose(thinned(torch.ones(3), 0.4, False), torch.full((3,), 0.6))
    halved = scattered(CaptionDecoder(**SIZES, gate_dropout=0.4)).eval()
    plain = CaptionDecoder(**SIZES).double()
    plain.load_state_dict(halved.state_dict())
    with torch.no_grad():
        for layer in (plain.cells[0].feed, plain.cells[0].recur, plain.cells[0].see):
            layer.weight[:12] *= 0.6
        plain.cells[0].feed.bias[:12] *= 0.6
    assert torch.allclose(halved(a, words).logits, plain(a, words).logits)
    deep = {"deep_start": 2, "deep_readout": 2}
    thin, plain = scattered(CaptionDecoder(**SIZES, **deep, dropout=0.4)).eval(), CaptionDecoder(**SIZES, **deep).double()
    plain.load_state_dict(thin.state_dict())
    with torch.no_grad():
        for layer in (plain.cells[0].start_hidden, plain.cells[0].start_memory, plain.tell, plain.tell_deep[0], plain.out):
            layer.weight *= 0.6
    assert torch.allclose(thin(a, words).logits, plain(a, words).logits)


@pytest.mark.parametrize("form", [{}, {"layers": 2, "around": True}])
def test_beams(form):
    a, _ = given()
    d = scattered(CaptionDecoder(**SIZES, **form)).train()
    both = d.generate(a, 3, 5)
    assert d.training and both[1] == d.generate(a[1:], 3, 5)[0] and len(both) == 2 and d.generate(a[:0]) == []
    for captions in both:
        assert len(captions) <= 3 and [x.log_p for x in captions] == sorted((x.log_p for x in captions), reverse=True)
        for caption in captions:
            assert len(caption.words) == 5 or caption.words[-1] == 0
    for beam in both[0]:
        log_p = d.eval()(a[:1], torch.tensor([beam.words])).logits[0].log_softmax(-1)
        assert float(sum(log_p[t, w] for t, w in enumerate(beam.words))) == pytest.approx(beam.log_p)
    table = torch.tensor([[0.5, 0.3, 0.2]]).log()

    def step(words, state):
        return table.expand(len(state[0]), -1), state

    short = beam_search(step, (torch.zeros(1),), width=2, max_length=2)
    assert [x.words for x in short] == [(0,), (1, 0)] and short[1].log_p == pytest.approx(math.log(0.15))
    assert beam_search(step, (torch.zeros(1),), end=9, max_length=3) == [Beam((0, 0, 0), pytest.approx(3 * math.log(0.5)))]
    long = beam_search(step, (torch.zeros(1),), width=4, max_length=2, end=2, per_word=True)
    assert [x.words for x in long][:1] == [(0, 0)] and long[-1].words == (2,)
    with pytest.raises(RegardError, match="width=0"):
        d.generate(a, 0)


def test_maps():
    w = torch.arange(12.0).reshape(1, 2, 6)
    assert torch.equal(attention_maps(w, (2, 3))[0, 1], torch.tensor([[6.0, 7, 8], [9, 10, 11]]))
    assert attention_maps(w, (2, 3), (8, 9)).shape == (1, 2, 8, 9)
    with pytest.raises(RegardError, match=r"grid=\(2, 2\)"):
        attention_maps(w, (2, 2))


@pytest.mark.parametrize(
    ("options", "why"),
    [({"attention": "firm"}, "firm"), ({"deep_start": 0}, "deep_start=0"), ({"deep_readout": 0}, "deep_readout=0"), ({"sampled": 1.5}, "1.5"),
     ({"deep_attention": 0}, "layers=0"), ({"layers": 0}, "layers=0"), ({"attention": "hard", "layers": 2}, "one if"), ({"attention": "hard", "reads": "best"}, "best")],
)  # fmt: skip
def test_options_refused(options, why):
    with pytest.raises(RegardError, match=why):
        CaptionDecoder(**SIZES, **options)


def test_calls_refused():
    d = CaptionDecoder(**SIZES).double()
    a, words = given()
    for bad in (words + 3, words - 9):
        with pytest.raises(RegardError, match="expected 0 to 6"):
            d(a, bad)
    for wrong in ((a[:, :0], words), (a, words[:, :0])):
        with pytest.raises(RegardError, match="at least one"):
            d(*wrong)
    with pytest.raises(RegardError, match="no places"):
        d.cells[0].attention(torch.zeros(2, 4).double(), a[:, :0])
    assert d(a[:0], words[:0]).logits.shape == (0, 4, 7)


def test_gradcheck():
    d, (a, words) = scattered(CaptionDecoder(**SIZES, selector=True)), given(1, 3, 2)
    assert torch.autograd.gradcheck(lambda x: d(x, words)[:2], a.requires_grad_())
