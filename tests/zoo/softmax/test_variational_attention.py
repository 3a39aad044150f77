"""Latent alignments: scores, every mode's loss with its draws repeated by hand, prediction over the likeliest alignments."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import RegardError
from regard.zoo.softmax.variational_attention import AlignmentScore, LatentAlignment


def made(mode: str, **options: object) -> tuple[LatentAlignment, Tensor, Tensor, Tensor]:
    model = LatentAlignment(4, 5, mode, **options).double()  # type: ignore[arg-type]
    return model, torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 6, 4, dtype=torch.float64), torch.tensor([0, 3, 4])


def emitted(model: LatentAlignment, h: Tensor, context: Tensor, y: Tensor) -> Tensor:
    """log p(y | context, h), one sample at a time."""
    rows = []
    for one, c, target in zip(h, context, y, strict=True):
        logits = model.out.weight @ torch.tanh(model.join.weight @ torch.cat((one, c)) + model.join.bias) + model.out.bias
        rows.append(logits[target] - torch.logsumexp(logits, 0))
    return torch.stack(rows)


def parts(model: LatentAlignment, h: Tensor, memory: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_p, log_q = model.prior(h, memory).log_softmax(-1), posterior(model, h, memory, y).log_softmax(-1)
    return log_p, torch.stack([emitted(model, h, memory[:, z], y) for z in range(6)], 1), log_q


def posterior(model: LatentAlignment, h: Tensor, memory: Tensor, y: Tensor) -> Tensor:
    """Bilinear scores of a bidirectional network's states with an embedding of (h, y)."""
    net, rows = model.infer, []
    for one, states, target in zip(h, memory, y, strict=True):
        query = net.query.weight @ torch.cat((one, net.embed.weight[target])) + net.query.bias
        keys = net.read(states[None])[0][0] @ net.key.weight.T
        rows.append(keys @ query)
    assert net.read.bidirectional
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["additive", "bilinear"])
def test_scores(kind: str) -> None:
    score, h, memory = AlignmentScore(4, kind).double(), torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 6, 4, dtype=torch.float64)
    for n in range(3):
        for s in range(6):
            if kind == "additive":
                want = score.v.weight[0] @ torch.tanh(score.w.weight @ h[n] + score.u.weight @ memory[n, s])  # type: ignore[union-attr]
            else:
                want = (score.w.weight @ h[n]) @ memory[n, s]
            torch.testing.assert_close(score(h, memory)[n, s], want)
    assert AlignmentScore(4).u is not None


def test_modes_without_draws() -> None:
    model, h, memory, y = made("soft")
    log_p, emission, log_q = parts(model, h, memory, y)
    soft = emitted(model, h, (log_p.exp()[..., None] * memory).sum(1), y)
    exact = torch.logsumexp(log_p + emission, -1)
    bound = (log_q.exp() * (emission + log_p - log_q)).sum(-1)
    for mode, want in (("soft", soft), ("exact", exact), ("enumerate", bound)):
        found = model(h, memory, y, mode=mode)
        torch.testing.assert_close(found.log_likelihood, want)
        torch.testing.assert_close(found.loss, -want.mean())
        torch.testing.assert_close(found.alignment, log_p.exp())
    torch.testing.assert_close(model(h, memory, y).log_likelihood, soft)


@pytest.mark.parametrize("mode", ["hard", "sample"])
@pytest.mark.parametrize("baseline", [True, False])
def test_score_function_estimates(mode: str, baseline: bool) -> None:
    model, h, memory, y = made(mode, samples=4, baseline=baseline)
    log_p, emission, log_q = parts(model, h, memory, y)
    source = log_p if mode == "hard" else log_q
    torch.manual_seed(3)
    z = torch.multinomial(source.exp().detach(), 4, replacement=True)
    torch.manual_seed(3)
    found = model(h, memory, y)
    gain = emission.gather(1, z)
    base = emitted(model, h, (log_p.exp()[..., None] * memory).sum(1), y)[:, None] if baseline else torch.zeros(3, 1, dtype=torch.float64)
    surrogate = (gain + (gain - base).detach() * source.gather(1, z)).mean(1)
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1) if mode == "sample" else torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(found.log_likelihood, gain.mean(1) - divergence)
    torch.testing.assert_close(found.loss, -(surrogate - divergence).mean())
    same(model, found.loss, -(surrogate - divergence).mean())


def same(model: LatentAlignment, loss: Tensor, want: Tensor) -> None:
    grads = [torch.autograd.grad(x, list(model.parameters()), allow_unused=True, retain_graph=True) for x in (loss, want)]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
def test_wake_sleep(leave_one_out: bool, samples: int) -> None:
    model, h, memory, y = made("wake_sleep", samples=samples, leave_one_out=leave_one_out)
    log_p, emission, log_q = parts(model, h, memory, y)
    torch.manual_seed(3)
    z = torch.multinomial(log_q.exp().detach(), samples, replacement=True)
    torch.manual_seed(3)
    found = model(h, memory, y)
    joint, proposal = (log_p + emission).gather(1, z), log_q.gather(1, z)
    log_w = (joint - proposal).detach()
    bound = torch.logsumexp(log_w, 1) - math.log(samples)
    torch.testing.assert_close(found.log_likelihood, bound)
    w = log_w.softmax(1)
    if leave_one_out and samples > 1:
        others = []
        for n in range(samples):  # the mean of the others' logarithms in its place
            swapped = log_w.clone()
            swapped[:, n] = torch.stack([log_w[:, m] for m in range(samples) if m != n], 1).mean(1)
            others.append(torch.logsumexp(swapped, 1) - math.log(samples))
        surrogate = (w * (joint - proposal)).sum(1) + ((bound[:, None] - torch.stack(others, 1)) * proposal).sum(1)
    else:
        surrogate = (w * (joint + proposal)).sum(1)
    same(model, found.loss, -surrogate.mean())


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_gumbel(temperature: float) -> None:
    model, h, memory, y = made("gumbel", **({} if temperature == 0.5 else {"temperature": temperature}))
    log_p, _, log_q = parts(model, h, memory, y)
    torch.manual_seed(3)
    noise = -torch.empty_like(log_q).exponential_().log()
    torch.manual_seed(3)
    found = model(h, memory, y)
    relaxed = ((log_q + noise) / temperature).softmax(-1)
    want = emitted(model, h, (relaxed[..., None] * memory).sum(1), y) - (log_q.exp() * (log_q - log_p)).sum(-1)
    torch.testing.assert_close(found.log_likelihood, want)
    same(model, found.loss, -want.mean())


@pytest.mark.parametrize("floor", [0.1, 0.7])
def test_dirichlet(floor: float) -> None:
    model, h, memory, y = made("dirichlet", **({} if floor == 0.1 else {"floor": floor}))
    a = F.softplus(posterior(model, h, memory, y)) + floor
    b = F.softplus(model.prior(h, memory)) + floor
    torch.manual_seed(3)
    drawn = torch.distributions.Dirichlet(a).rsample()
    torch.manual_seed(3)
    found = model(h, memory, y)
    total = a.sum(-1)
    divergence = torch.lgamma(total) - torch.lgamma(a).sum(-1) - torch.lgamma(b.sum(-1)) + torch.lgamma(b).sum(-1)
    divergence = divergence + ((a - b) * (torch.digamma(a) - torch.digamma(total)[:, None])).sum(-1)
    torch.testing.assert_close(found.log_likelihood, emitted(model, h, (drawn[..., None] * memory).sum(1), y) - divergence)


@pytest.mark.parametrize("top", [None, 1, 3, 9])
def test_prediction(top: int | None) -> None:
    model, h, memory, _ = made("exact")
    p = model.prior(h, memory).softmax(-1)
    kept = p.argsort(-1, descending=True)[:, :top] if top is not None else torch.arange(6).expand(3, -1)
    want = torch.zeros(3, 5, dtype=torch.float64)
    for n in range(3):
        for z in kept[n].tolist():
            for c in range(5):
                want[n, c] += p[n, z] * emitted(model, h[n : n + 1], memory[n : n + 1, z], torch.tensor([c]))[0].exp()
        want[n] /= p[n, kept[n]].sum()
    torch.testing.assert_close(model.predict(h, memory, top), want.log())


def test_defaults_and_refusals() -> None:
    model = LatentAlignment(4, 5)
    assert (model.mode, model.samples, model.temperature, model.floor, model.baseline, model.leave_one_out) == (
        "sample",
        1,
        0.5,
        0.1,
        True,
        False,
    )
    assert model.prior.u is not None and LatentAlignment(4, 5, score="bilinear").prior.u is None
    assert isinstance(model.infer.read, nn.GRU) and model.infer.read.batch_first
    for make, words in (
        (lambda: LatentAlignment(4, 5, "viterbi"), "soft, exact"),
        (lambda: AlignmentScore(4, "dot"), "additive or bilinear"),
    ):
        with pytest.raises(RegardError, match=words):
            make()
