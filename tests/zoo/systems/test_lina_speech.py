"""Lina-Speech: padded batches, generation, tuned states, bad input."""

import pytest
import torch

from regard import RegardError
from regard.zoo.systems.lina_speech import InitialStateTuner, LinaLM, delayed, undelayed


def small(**options):
    torch.manual_seed(0)
    return LinaLM(9, 5, 2, **{"dim": 16, "heads": 2, "layers": 1, "text_layers": 1, **options}).eval()


def test_rows_of_a_padded_batch_get_what_they_get_alone():
    model, tokens = small(), delayed(torch.randint(0, 5, (2, 2, 6)))
    text = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    both = model(text, tokens)
    assert torch.allclose(both[1:], model(text[1:, :2], tokens[1:]), atol=1e-5)
    ended = torch.cat((tokens, torch.zeros(2, 4, 2, dtype=torch.long)), 1)
    assert torch.allclose(model(text, ended)[:, : tokens.shape[1]], both, atol=1e-5)


def test_generation_goes_on_from_a_prompt_and_stops_at_the_tail():
    model, text = small(), torch.tensor([[3, 4, 5]])
    out = model.generate(text, 12, sampled=0)
    assert out.shape[0] == 1 and out.shape[2] == 2 and torch.equal(out[:, 0], torch.ones(1, 2, dtype=torch.long))
    assert torch.equal(model.generate(text, 12 - 5, prompt=out[:, :6], sampled=0), out)
    for head in model.heads:
        head.weight.data.zero_()
        head.weight.data[2] = 1e-3
    model.behind[0].mlp.out.bias.data.fill_(50.0)
    assert model.generate(text, 12, sampled=0).shape[1] == 2  # the tail comes first of all
    drawn = small().generate(text, 5, top=2, sampled=2, generator=torch.Generator().manual_seed(1))
    assert drawn.shape == (1, 6, 2) or bool((drawn[:, -1] == 2).all())
    assert undelayed(delayed(torch.ones(1, 2, 4).long())).tolist() == [[[1] * 4] * 2]


def test_every_parameter_learns_and_states_alone_in_tuning():
    model = small(dropout=0.0).train()
    model.loss(torch.tensor([[3, 4, 5]]), delayed(torch.randint(0, 5, (1, 2, 6)))).backward()
    unfelt = {"cross.k.bias"}
    assert {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()} <= unfelt
    model.zero_grad()
    tuner = InitialStateTuner(model, rank=2)
    model.text.requires_grad_(False)
    tuner.fit(model, [(torch.tensor([[3, 4]]), delayed(torch.randint(0, 5, (1, 2, 6))))] * 4)
    assert not model.text.weight.requires_grad and model.heads[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_bad_input():
    model, tokens = small(), delayed(torch.randint(0, 5, (1, 2, 6)))
    with pytest.raises(RegardError, match="at least one that is not 0"):
        model(torch.zeros(1, 3).long(), tokens)
    for wrong in (tokens[..., :1], tokens[0], tokens.repeat(2, 1, 1)):
        with pytest.raises(RegardError, match=r"\(B, n, 2\)"):
            model(torch.tensor([[3]]), wrong)
    with pytest.raises(RegardError, match="one a block"):
        model(torch.tensor([[3]]), tokens, [None])
    with pytest.raises(RegardError, match="nothing to predict"):
        model.loss(torch.tensor([[3]]), torch.ones(1, 4, 2).long())
    for options in ({"dim": 18}, {"layers": 0}, {"places": 5}):
        with pytest.raises(RegardError, match="expected positive"):
            small(**options)
    with pytest.raises(RegardError, match="rank=0"):
        InitialStateTuner(model, 0)


def test_first_states_and_the_steps_of_tuning():
    model = small(dropout=0.0)
    tuner = InitialStateTuner(model, rank=2, scale=0.5, generator=torch.Generator().manual_seed(3))
    states = tuner.states()
    assert len(states) == len(model.blocks) == 3
    for state, u, w in zip(states, tuner.u, tuner.w, strict=True):
        assert torch.allclose(state[0], 0.5 * sum(u[:, :, r, None] * w[:, r, None] for r in range(2)))
    assert InitialStateTuner(model).scale == 0.02 and torch.equal(
        InitialStateTuner(model, 2, generator=torch.Generator().manual_seed(3)).u[0], tuner.u[0]
    )
    batch, seen = (torch.tensor([[3, 4]]), delayed(torch.randint(0, 5, (1, 2, 6)))), []
    before = [p.detach().clone() for p in tuner.parameters()]
    first = model.loss(*batch, tuner.states()).item()
    tuner.fit(model, [batch] * 3, lr=0.1, watch=seen.append)
    assert all(torch.equal(p, old) for p, old in zip(tuner.parameters(), before, strict=True))  # no step before the fourth
    assert seen == pytest.approx([first] * 3)
    tuner.zero_grad()
    tuner.fit(model, [batch] * 5, lr=0.1, accumulate=2)
    moved = torch.cat([(p - old).flatten() for p, old in zip(tuner.parameters(), before, strict=True)]).abs()
    assert 0.15 < float(moved.max()) < 0.21  # two steps of Adam of 0.1 each
    before = [p.detach().clone() for p in tuner.parameters()]
    tuner.zero_grad()
    tuner.fit(model, [batch] * 4)
    moved = torch.cat([(p - old).flatten() for p, old in zip(tuner.parameters(), before, strict=True)]).abs()
    assert 0.09 < float(moved.max()) < 0.11 and model.loss(*batch, tuner.states()).item() < first


def test_drawing_is_by_temperature_among_the_likeliest():
    model, text = small(), torch.tensor([[3, 4, 5]]).expand(400, -1)
    with torch.no_grad():
        logits = model(text[:1], torch.ones(1, 1, 2, dtype=torch.long))[0, 0]
    for options, t, top in (({}, 1.0, 100), ({"temperature": 0.3}, 0.3, 100), ({"top": 2}, 1.0, 2)):
        drawn = model.generate(text, 1, generator=torch.Generator().manual_seed(0), **options)[:, 1]
        kept = logits[0].topk(min(top, 8)).indices
        p = torch.zeros(8).index_put((kept,), (logits[0, kept] / t).softmax(0))
        share = torch.bincount(drawn[:, 0], minlength=8) / 400
        assert float((share - p).abs().max()) < 0.1 and not bool(share[p == 0].any())
        assert bool((drawn[:, 1] == logits[1].argmax()).all())  # the second stream is greedy
    assert small().generate(text[:1], 3, sampled=0).shape[1] <= 4
