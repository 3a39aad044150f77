"""Penalties at the edge and models on padding."""

import math

import pytest
import torch

import regard
from regard.zoo.analysis.deceptive_attention import (
    BiLSTMAttention,
    ClsTransformer,
    EmbAttention,
    Translator,
    attention_penalty,
    deception_report,
    train_translator,
    translation,
)


def test_penalties_refuse_bad_shapes_and_hold_at_the_edge():
    a = torch.tensor([[0.0, 1.0]], requires_grad=True)
    penalty = attention_penalty(a, torch.tensor([[0, 1]]), 1.0)  # all on what it must not see
    assert bool(penalty.isfinite()) and float(attention_penalty(a, torch.tensor([[0, 0]]), 1.0)) == pytest.approx(0, abs=1e-9)
    for call, message in (
        (lambda: attention_penalty(a, torch.ones(1, 3), 1.0), "expected"),
        (lambda: attention_penalty(a, torch.ones(1, 2), 1.0, "sum"), "reduce"),
        (lambda: attention_penalty(a, torch.ones(1, 2), -1.0), "lam"),
        (lambda: Translator(5, attention="hard"), "attention"),
        (lambda: translation("sort", 1, 4, 5, torch.Generator()), "kind"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            call()
    for model in (EmbAttention(9, 8).eval(), BiLSTMAttention(9, 8, 4).eval()):
        logits, alpha = model(torch.tensor([[3, 4, 0, 0], [0, 0, 0, 0]]))
        assert bool(logits.isfinite().all()) and not alpha[0, 2:].any() and not alpha[1].any()
    source, target, _ = translation("copy", 2, 4, 5, torch.Generator())
    assert float(Translator(5, 8, "uniform")(source, target)[1].std()) < 1e-6


def test_penalties_by_hand():
    a = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    a = a / a.sum(-1, keepdim=True)
    hidden, by_query = torch.randint(2, (2, 5)), torch.randint(2, (2, 4, 5))
    for eps in (1e-12, 0.1):
        for mask, own in ((hidden, lambda b, t: hidden[b]), (by_query, lambda b, t: by_query[b, t])):
            for reduce in ("mean", "max"):
                total = []
                for b in range(2):
                    for t in range(4):
                        heads = [math.log(1 - float((a[b, h, t] * own(b, t)).sum()) + eps) for h in range(3)]
                        total.append(sum(heads) / 3 if reduce == "mean" else min(heads))
                truth = -0.7 * sum(total) / 8
                assert float(attention_penalty(a, mask, 0.7, reduce, eps)) == pytest.approx(truth)
    assert float(attention_penalty(a[:, 0], by_query, 1.0)) == pytest.approx(float(attention_penalty(a[:, :1], by_query, 1.0)))
    assert float(attention_penalty(a[:, 0, 0], hidden, 1.0)) == pytest.approx(float(attention_penalty(a[:, :1, :1], hidden, 1.0)))


def test_classifiers_by_hand():
    torch.manual_seed(0)
    ids, keep = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]]), torch.tensor([[True, True, True, False], [True, False, True, True]])
    for model in (EmbAttention(9, 6, 3).double(), BiLSTMAttention(9, 6, 5, 3).double()):
        for given in (None, keep):
            seen = ids != 0 if given is None else given
            x = model.embed.weight[ids]
            states = model.lstm(x * seen[..., None])[0] if isinstance(model, BiLSTMAttention) else x
            inner, outer = model.attention.inner, model.attention.outer
            s = (torch.tanh(states @ inner.weight.T + inner.bias) @ outer.weight.T)[..., 0]
            alpha = s.masked_fill(~seen, -torch.inf).softmax(1)
            logits = (alpha[..., None] * states).sum(1) @ model.out.weight.T + model.out.bias
            found = model(ids, given)
            assert torch.allclose(found[0], logits) and torch.allclose(found[1], alpha)
    assert BiLSTMAttention(9, 6, 5, 3).lstm.hidden_size == 5 and EmbAttention(9, 6, pad=4).pad == 4
    assert BiLSTMAttention(9).out.in_features == 128 and EmbAttention(9).out.out_features == 2


def test_what_a_blocked_transformer_may_see():
    """The first token sees all; the others their own group, and never the first, which has read everything."""
    ids, group = torch.tensor([[1, 2, 3, 4, 0]]), torch.tensor([[0, 1, 0, 1, 0]])
    for blocked in (True, False):
        model = ClsTransformer(9, 8, 2, 1, length=5, blocked=blocked)
        seen = model.visible(ids, group, None).expand(1, 1, 5, 5)[0, 0]
        for i in range(5):
            for j in range(5):
                alike = i == 0 or (j != 0 and group[0, i] == group[0, j])
                assert bool(seen[i, j]) == (j != 4 and (alike or not blocked))
    keep = torch.tensor([[True, True, False, True, True]])
    assert ClsTransformer(9, 8, 2, 1, length=5).visible(ids, None, keep)[0, 0].expand(5, 5)[3].tolist() == keep[0].tolist()
    logits, alpha = ClsTransformer(9, 8, 2, 3, 4, length=5)(ids)
    assert (
        logits.shape == (1, 4)
        and alpha.shape == (1, 2, 1, 5)
        and not alpha[..., 4].any()
        and torch.allclose(alpha.sum(-1), torch.ones(1, 2, 1))
    )


def test_translators_and_the_report_by_hand():
    torch.manual_seed(0)
    source, target, aligned = translation("flip", 3, 5, 6, torch.Generator().manual_seed(0))
    for kind in ("learned", "uniform", "none"):
        model = Translator(6, 8, kind).double()
        states, last = model.encoder(model.embed.weight[source])
        inputs = torch.cat((torch.full((3, 1), 6), target[:, :-1]), 1)
        h, _ = model.decoder(model.embed.weight[inputs], torch.cat((last[0], last[1]), -1)[None])
        s = h @ model.query.weight.T @ states.mT
        alpha = s.softmax(-1) if kind == "learned" else torch.full((3, 5, 5), 0.2)
        context = alpha.double() @ states if kind != "none" else torch.zeros_like(h)
        out = torch.tanh(torch.cat((h, context), -1) @ model.join.weight.T + model.join.bias) @ model.out.weight.T + model.out.bias
        found = model(source, target)
        assert torch.allclose(found[0], out) and torch.allclose(found[1], alpha.double())
    assert torch.equal(target, source[:, [1, 0, 3, 2, 4]]) and torch.equal((aligned * source[:, None]).sum(-1), target)
    model, ids = EmbAttention(9, 6), torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    labels, gone = torch.tensor([0, 1]), torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1]])
    found, (logits, alpha) = deception_report(model, ids, labels, gone), model(ids)
    hidden = model(torch.where(gone.bool(), 0, ids), (ids != 0) & ~gone.bool())[0]
    norms = model.embed.weight.norm(dim=1)
    assert found.accuracy == float((logits.argmax(1) == labels).double().mean()) and found.blocked == float(
        (hidden.argmax(1) == labels).double().mean()
    )
    assert found.mass == pytest.approx(float((alpha * gone).sum(1).mean())) and found.norms == pytest.approx(
        float(norms[[2, 4, 7]].mean() / norms[[1, 3, 5, 6]].mean())
    )


def test_a_transformer_read_at_its_first_token_by_hand():
    torch.manual_seed(0)
    ids = torch.tensor([[1, 2, 3, 4, 0], [5, 6, 7, 8, 2]])
    model = ClsTransformer(9, 8, 2, 2, 3, length=7)
    assert abs(float(ClsTransformer(9, 64, length=64).place.detach().std()) / 0.02 - 1) < 0.1
    assert {tuple(sorted(p.shape)) for name, p in model.named_parameters() if "mlp" in name and p.dim() == 2} == {(8, 16)}
    assert len(model.blocks) == 2 and all(isinstance(block.norm1, torch.nn.LayerNorm) for block in model.blocks)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = model.embed.weight[ids] + model.place[:5]
    hidden = (ids == 0)[:, None, None]
    for block in model.blocks:
        y, mixer = block.norm1(x), block.mixer
        q, k, v = (one(y).unflatten(-1, (2, 4)).transpose(1, 2) for one in (mixer.q, mixer.k, mixer.v))
        alpha = (q @ k.mT / 2).masked_fill(hidden, -torch.inf).softmax(-1)
        x = x + mixer.out((alpha @ v).transpose(1, 2).flatten(-2))
        x = x + block.mlp(block.norm2(x))
    logits, found = model(ids)
    torch.testing.assert_close(found, alpha[:, :, :1])
    torch.testing.assert_close(logits, x[:, 0] @ model.out.weight.T + model.out.bias)


@pytest.mark.parametrize(("kind", "attention", "lam"), [("reverse", "learned", 0.5), ("flip", "uniform", 0.0)])
def test_a_translator_s_training_by_its_recipe(kind, attention, lam):
    """Cross-entropy of every word plus the penalty on aligned words; scores on 300 sentences of another seed."""
    sizes = {"length": 4, "vocab": 5, "dim": 8, "steps": 3, "batch": 6, "lr": 0.05, "seed": 2}
    found = train_translator(kind, lam, attention, **sizes)
    torch.manual_seed(2)
    model, generator = Translator(5, 8, attention), torch.Generator().manual_seed(2)
    optimiser = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(3):
        source, target, aligned = translation(kind, 6, 4, 5, generator)
        logits, alpha = model(source, target)
        loss = -logits.log_softmax(-1).gather(-1, target[..., None]).mean() - lam * (1 - (alpha * aligned).sum(-1)).log().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    source, target, aligned = translation(kind, 300, 4, 5, torch.Generator().manual_seed(7))
    with torch.no_grad():
        logits, alpha = model(source, target)
    right = sum(int(logits[b, t].argmax()) == int(target[b, t]) for b in range(300) for t in range(4)) / 1200
    mass = float(torch.stack([alpha[b, t, aligned[b, t].argmax()] for b in range(300) for t in range(4)]).mean())
    assert found == pytest.approx((right, mass), abs=1e-5)


@pytest.mark.parametrize("length", range(1, 9))
def test_orders_of_words(length):
    words = list(range(length))
    orders = {"copy": words, "reverse": words[::-1], "flip": [w for pair in zip(words[1::2], words[::2], strict=False) for w in pair]}
    for kind, order in orders.items():
        order = order + words[len(order) :]  # the last of an odd number stays
        source, target, aligned = translation(kind, 3, length, 50, torch.Generator().manual_seed(length))
        assert torch.equal(target, source[:, order]) and torch.equal(aligned.argmax(-1), torch.tensor([order] * 3))
        assert aligned.shape == (3, length, length) and bool((aligned.sum(-1) == 1).all())
