"""Checks of variational-attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.latent import gradient
from regard.lab.verification import check
from regard.zoo.softmax.variational_attention import LatentAlignment


def aligned(mode: str, **options: object) -> tuple[LatentAlignment, Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    model = LatentAlignment(6, 5, mode, **options).double()  # type: ignore[arg-type]
    return model, torch.randn(3, 6, dtype=F64), 2 * torch.randn(3, 7, 6, dtype=F64), torch.tensor([0, 3, 4])


@check(
    "variational-attention",
    "S = 7: the exact mode == log sum_z p(z) p(y | x_z) by enumeration; the ELBO equals it at the true posterior",
    below=1e-10,
    control="soft attention",
)
def _() -> tuple[float, float]:
    model, h, memory, y = aligned("exact")
    truth = []
    for n in range(3):
        terms = []
        logits = model.prior(h[n : n + 1], memory[n : n + 1])[0]
        for z in range(7):
            emitted = model.out(torch.tanh(model.join(torch.cat((h[n], memory[n, z]))))).log_softmax(-1)[y[n]]
            terms.append(logits.log_softmax(-1)[z] + emitted)
        truth.append(torch.logsumexp(torch.stack(terms), 0))
    log_p = model.prior(h, memory).log_softmax(-1)
    posterior = (log_p + model.emission(h, memory, y)).log_softmax(-1)
    tight = naive.gap(model.elbo(h, memory, y, log_p, posterior), torch.stack(truth))
    exact = naive.gap(model(h, memory, y).log_likelihood, torch.stack(truth))
    return max(tight, exact), naive.gap(model(h, memory, y, mode="soft").log_likelihood, torch.stack(truth))


@check("variational-attention", "ELBO - exact for 50 random q, the largest", below=0.0, control="the ELBO without its divergence")
def _() -> tuple[float, float]:
    model, h, memory, y = aligned("enumerate")
    log_p = model.prior(h, memory).log_softmax(-1)
    exact = model(h, memory, y, mode="exact").log_likelihood
    gaps, bare = [], []
    for _ in range(50):
        log_q = (2 * torch.randn(3, 7, dtype=F64)).log_softmax(-1)
        gaps.append(float((model.elbo(h, memory, y, log_p, log_q) - exact).max().detach()))
        bare.append(float(((log_q.exp() * model.emission(h, memory, y)).sum(-1) - exact).max().detach()))
    return max(gaps), max(bare)


@check(
    "variational-attention",
    "20000 samples: the REINFORCE gradient's relative distance to the enumerated ELBO's",
    below=0.05,
    control="without the score-function term",
)
def _() -> tuple[float, float]:
    model, h, memory, y = aligned("sample", samples=20000)
    truth = gradient(model, model(h, memory, y, mode="enumerate").loss)
    own = gradient(model, model(h, memory, y).loss)
    log_p = model.prior(h, memory).log_softmax(-1)
    log_q = model.posterior(h, memory, y)
    pathless = (log_q.exp().detach() * model.emission(h, memory, y)).sum(-1) - (log_q.exp() * (log_q - log_p)).sum(-1)
    other = gradient(model, -pathless.mean())
    return float((own - truth).norm() / truth.norm()), float((other - truth).norm() / truth.norm())


@check(
    "variational-attention",
    "40 single-sample gradients: their variance over that without a baseline",
    below=0.5,
    control="no baseline again",
)
def _() -> tuple[float, float]:
    def variance(baseline: bool, first: int) -> float:
        model, h, memory, y = aligned("sample", baseline=baseline)
        drawn = []
        for seed in range(first, first + 40):
            torch.manual_seed(seed)
            drawn.append(gradient(model, model(h, memory, y).loss))
        return float(torch.stack(drawn).var(0).sum())

    plain = variance(False, 0)
    return variance(True, 0) / plain, variance(False, 1000) / plain


def joint_of(model: LatentAlignment, h: Tensor, memory: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p(z), log p(y | x_z) and log q(z), (N, S) each, an alignment at a time."""
    emitted = torch.stack(
        [model.out(torch.tanh(model.join(torch.cat((h, memory[:, z]), -1)))).log_softmax(-1).gather(1, y[:, None])[:, 0] for z in range(7)],
        1,
    )
    return model.prior(h, memory).log_softmax(-1), emitted, model.infer(h, memory, y).log_softmax(-1)


@check(
    "variational-attention",
    "20000 samples: gradients of the hard mode, and of wake-sleep, over those of their enumerated sums, largest relative distance",
    below=0.05,
    control="the ELBO's gradient",
)
def _() -> tuple[float, float]:
    model, h, memory, y = aligned("hard", samples=20000)
    log_p, emitted, log_q = joint_of(model, h, memory, y)
    hard = gradient(model, -(log_p.exp() * emitted).sum(-1).mean())
    true = (log_p + emitted).softmax(-1).detach()  # what normalised weights of many draws tend to
    asleep = gradient(model, -(true * (log_p + emitted + log_q)).sum(-1).mean())
    elbo = gradient(model, model(h, memory, y, mode="enumerate").loss)
    own = [(gradient(model, model(h, memory, y, mode=mode).loss), truth) for mode, truth in (("hard", hard), ("wake_sleep", asleep))]
    return max(apart(found, truth) for found, truth in own), min(apart(elbo, truth) for truth in (hard, asleep))


def apart(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@check(
    "variational-attention",
    "leave-one-out, two draws, 12000 pairs: gradient over that of E log((w_1 + w_2) / 2), every pair enumerated",
    below=0.05,
    control="wake-sleep's own gradient",
)
def _() -> tuple[float, float]:
    model, h, memory, y = aligned("wake_sleep", samples=2, leave_one_out=True)
    log_p, emitted, log_q = joint_of(model, h, memory, y)
    w = log_p + emitted - log_q
    pairs = torch.logaddexp(w[:, :, None], w[:, None]) - math.log(2)
    truth = gradient(model, -((log_q[:, :, None] + log_q[:, None]).exp() * pairs).sum((1, 2)).mean())
    many = [x.repeat(4000, *(1,) * (x.dim() - 1)) for x in (h, memory, y)]
    found = []
    for model.leave_one_out in (True, False):
        torch.manual_seed(4)
        found.append(gradient(model, model(*many).loss))
    return apart(found[0], truth), apart(found[1], truth)


@check(
    "variational-attention",
    "noisy lookup task, 150 steps: negative log-likelihood of the sampled mode, marginalised",
    below=0.8,
    control="soft attention untrained",
)
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    keys = torch.randn(6, 8)

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        z, content = torch.randint(6, (64,)), torch.randint(4, (64, 6))
        memory = torch.cat((keys.expand(64, -1, -1), torch.nn.functional.one_hot(content, 4).float() * 2, torch.zeros(64, 6, 4)), -1)
        h = torch.nn.functional.pad(keys[z], (0, 8)) + 0.1 * torch.randn(64, 16)
        return h, memory, content.gather(1, z[:, None]).squeeze(1)

    model = LatentAlignment(16, 4, "sample", score="bilinear", samples=4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def score() -> float:
        h, memory, y = batch()
        return float(-model.predict(h, memory).gather(1, y[:, None]).mean())

    before = score()
    for _ in range(150):
        loss = model(*batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return score(), before
