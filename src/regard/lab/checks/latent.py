"""Checks of attention as inference, of latent and monotonic alignments, and of recruitment."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ...engine import attend
from ...nn.alignment import LatentAlignment
from ...nn.monotonic import MonotonicDecoder, full_sum, jump_scores, sample_positions, stretched, viterbi
from .. import naive
from ..experiments.inference import coupled_marginals, energy, enumerate_joint, iterate, mixture_step, structural_attention
from ..experiments.recruitment import recruit, recruit_experts
from ..verification import check

F64 = torch.float64
VIEW, VARIATIONAL, MONOTONIC, RECRUITMENT = (
    "bayesian-attention-view",
    "variational-attention",
    "latent-monotonic-attention",
    "localist-recruitment",
)


@check(
    VIEW,
    "4 queries x 3 keys, 2 heads: all 81 assignments enumerated == softmax attention, with a prior as bias",
    below=1e-12,
    control="coupled edges",
)
def _() -> tuple[float, float]:
    q, k, v = torch.randn(2, 4, 8, dtype=F64), torch.randn(2, 3, 8, dtype=F64), torch.randn(2, 3, 5, dtype=F64)
    prior = torch.rand(2, 4, 3, dtype=F64).log()
    psi = q @ k.transpose(-1, -2) / 8**0.5
    joint = torch.stack([enumerate_joint(psi[h], log_prior=prior[h]) for h in range(2)])
    plain = torch.stack([enumerate_joint(psi[h]) for h in range(2)])
    library = structural_attention(psi, v, log_prior=prior)[0]
    truth = attend(q[None], k[None], v[None])[0]
    own = max(naive.gap(library, joint @ v), naive.gap(plain @ v, truth), naive.gap(library, (psi + prior).softmax(-1) @ v))
    coupling = torch.randn(4, 3, 4, 3, dtype=F64)
    return own, naive.gap(enumerate_joint(psi[0], coupling), psi[0].softmax(-1))


@check(
    VIEW,
    "beta = 1e4 == gathering the best key; slots == one EM step of a mixture; Hopfield's step == the energy's gradient",
    below=1e-10,
    control="beta = 1, in the first of these",
)
def _() -> tuple[float, float]:
    psi, v = torch.randn(6, 9, dtype=F64), torch.randn(9, 5, dtype=F64)
    best = v[psi.argmax(-1)]
    hot = naive.gap(structural_attention(1e4 * psi, v)[0], best)
    x, means = torch.randn(20, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    slot_scores = means @ x.T - means.square().sum(-1, keepdim=True) / 2
    slots = naive.gap(structural_attention(slot_scores, x, over="queries")[0], mixture_step(x, means))
    at = torch.randn(6, 3, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(energy(at, x, 2.0).sum(), at)
    step = naive.gap(iterate(at, x, 2.0) - at, -gradient)
    return max(hot, slots, step, naive.gap(structural_attention(psi, v, hard=True)[0], best)), naive.gap(
        structural_attention(psi, v)[0], best
    )


@check(VIEW, "a chain of coupled edges: sum-product == enumeration", below=1e-12, control="independent softmax")
def _() -> tuple[float, float]:
    psi, pair = torch.randn(4, 3, dtype=F64), torch.randn(3, 3, 3, dtype=F64)
    coupling = torch.zeros(4, 3, 4, 3, dtype=F64)
    for i in range(3):
        coupling[i, :, i + 1] = pair[i]
    truth = enumerate_joint(psi, coupling)
    return naive.gap(coupled_marginals(psi, pair), truth), naive.gap(psi.softmax(-1), truth)


def aligned(mode: str, **options: object) -> tuple[LatentAlignment, Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    model = LatentAlignment(6, 5, mode, **options).double()  # type: ignore[arg-type]
    return model, torch.randn(3, 6, dtype=F64), 2 * torch.randn(3, 7, 6, dtype=F64), torch.tensor([0, 3, 4])


@check(
    VARIATIONAL,
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


@check(VARIATIONAL, "ELBO - exact for 50 random q, the largest", below=0.0, control="the ELBO without its divergence")
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


def gradient(model: LatentAlignment, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(model.parameters(), found, strict=True)])


@check(
    VARIATIONAL,
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


@check(VARIATIONAL, "variance of single-sample gradients over that without a baseline", below=0.9, control="a baseline of 10")
def _() -> tuple[float, float]:
    model, h, memory, y = aligned("sample")

    def variance(baseline: bool, shift: float = 0.0) -> float:
        torch.manual_seed(5)
        log_p = model.prior(h, memory).log_softmax(-1)
        log_q = model.posterior(h, memory, y)
        score = torch.stack([gradient(model, log_q[0, z]) for z in range(7)])
        gain = model.emission(h, memory, y)[0].detach()
        base = model.soft(h, memory, y, log_p.exp())[0].detach() if baseline else torch.zeros((), dtype=F64)
        p = log_q[0].exp().detach()
        each = (gain - base - shift)[:, None] * score
        mean = (p[:, None] * each).sum(0)
        return float((p * (each - mean).square().sum(-1)).sum())

    return variance(True) / variance(False), variance(False, 10.0) / variance(False)


@check(
    VARIATIONAL,
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


@check(
    MONOTONIC,
    "T = 7, S = 3: the forward sum == all 35 alignments, Viterbi == the best of them",
    below=1e-10,
    control="positions that may stand still",
)
def _() -> tuple[float, float]:
    u, labels = torch.randn(7, dtype=F64), torch.randn(3, 7, dtype=F64)
    jumps = jump_scores(u)
    stop = torch.sigmoid(u)

    def probability(path: tuple[int, ...]) -> float:
        log, last = 0.0, -1
        for s, t in enumerate(path):
            log += math.log(float(stop[t])) + sum(math.log(1 - float(stop[x])) for x in range(last + 1, t)) + float(labels[s, t])
            last = t
        return log

    paths = list(itertools.combinations(range(7), 3))
    found = torch.tensor([probability(path) for path in paths], dtype=F64)
    best, value = viterbi(jumps, labels)
    right = tuple(best.tolist()) == paths[int(found.argmax())]
    own = max(abs(float(full_sum(jumps, labels) - torch.logsumexp(found, 0))), abs(float(value - found.max())))
    loose = torch.tensor([probability(p) for p in itertools.combinations_with_replacement(range(7), 3)], dtype=F64)
    return own if right and len(paths) == 35 else math.inf, abs(float(full_sum(jumps, labels) - torch.logsumexp(loose, 0)))


@check(
    MONOTONIC,
    "1000 drawn and decoded alignments: steps that do not move forward",
    below=0.0,
    control="independent soft attention's arg maxima",
)
def _() -> tuple[float, float]:
    drawn = sample_positions(torch.randn(1000, 12), 5)
    decoded = MonotonicDecoder(6, 5, 16).decode(torch.randn(4, 12, 6), 5)[1]
    free = torch.randn(1000, 5, 12).argmax(-1)
    return float(sum(int((x.diff(dim=-1) <= 0).sum()) for x in (drawn, decoded))), float((free.diff(dim=-1) <= 0).sum())


@check(MONOTONIC, "windows of width >= T == global attention, of width 0 == the frame", below=1e-12, control="width 2")
def _() -> tuple[float, float]:
    model = MonotonicDecoder(6, 5, 16, "window").double()
    x, at = torch.randn(2, 12, 6, dtype=F64), torch.tensor([[2, 5, 9], [0, 7, 11]])
    h, _ = model.encode(x)
    before = at - 1

    def context(kind: str, width: int = 0) -> Tensor:
        model.context, model.width = kind, width
        return model.contexts(h, before, at)

    wide, one, whole, frame = context("window", 12), context("window", 0), context("global"), context("hard")
    return max(naive.gap(wide, whole), naive.gap(one, frame)), naive.gap(context("window", 2), whole)


@check(
    MONOTONIC,
    "stretched symbols: label accuracy of the segmental model, where the median error of alignments is <= 1 frame",
    above=0.9,
    control="untrained",
)
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    model = MonotonicDecoder(6, 5, 32, "segment")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def accuracy() -> float:
        test, labels, last = stretched(64, seed=1)
        found, places = model.decode(test, 4)
        first = torch.nn.functional.pad(last[:, :-1] + 1, (1, 0))
        off = torch.maximum((first - places).clamp_min(0), (places - last).clamp_min(0))  # frames outside the symbol's own span
        return float((found == labels).float().mean()) if float(off.float().median()) <= 1 else 0.0

    before = accuracy()
    for step in range(350):
        x, y, _ = stretched(64, seed=100 + step)
        loss = -model(x, y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return accuracy(), before


def clusters(seed: int, count: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(count, 16, generator=generator, dtype=F64)
    centres = 6 * torch.linalg.qr(centres.T)[0].T[:count]  # unit-variance tokens around centres more than 6 sigma apart
    label = torch.arange(2000) % count
    return centres[label] + torch.randn(2000, 16, generator=generator, dtype=F64), label


@check(
    RECRUITMENT,
    "5 planted clusters, 5 seeds: runs that end at 5 blocks, purity >= 0.95, J falling by the margin at every step",
    above=4.0,
    control="blocks that cost nothing, but pay",
)
def _() -> tuple[float, float]:
    def good(free: bool) -> int:
        runs = 0
        for seed in range(5):
            x, label = clusters(seed)
            found = recruit(x, max_blocks=12, **({"cost": lambda *_: -2000.0} if free else {}))  # type: ignore[arg-type]
            purity = (
                sum(int(torch.bincount(label[found.labels == b]).max()) for b in range(len(found.means)) if bool((found.labels == b).any()))
                / 2000
            )
            lengths = [one.length for one in found.accepted]
            falling = all(b <= a - 8 for a, b in itertools.pairwise(lengths))
            runs += len(found.means) == 5 and purity >= 0.95 and falling
        return runs

    return good(False), good(True)


@check(RECRUITMENT, "pure noise: blocks recruited; doubling C(b) recruits no more", below=0.0, control="planted clusters")
def _() -> tuple[float, float]:
    noise = torch.randn(2000, 16, generator=torch.Generator().manual_seed(9), dtype=F64)
    x, _ = clusters(0)
    more = max(0, len(recruit(x, cost_factor=2.0).means) - len(recruit(x).means))
    return len(recruit(noise).means) - 1 + more, len(recruit(x).means) - 1


@check(
    RECRUITMENT,
    "three domains, one of them twice: experts recruited beyond three, and tokens routed wrongly",
    below=0.0,
    control="a free expert for each",
)
def _() -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    tables = [torch.softmax(3 * torch.randn(8, 8, generator=generator), -1) for _ in range(3)]
    features = torch.randn(3, 16, generator=generator)

    def text(table: Tensor) -> Tensor:
        tokens = [0]
        for _ in range(3000):
            tokens.append(int(torch.multinomial(table[tokens[-1]], 1, generator=generator)))
        return torch.tensor(tokens)

    domains = [(features[at], text(tables[at])) for at in (0, 1, 0, 2)]
    own = recruit_experts(domains, 8)
    wrong = int((own.route(features).argmax(-1) != torch.arange(3)).sum())
    return abs(len(own.models) - 3) + wrong, abs(len(recruit_experts(domains, 8, price=-1e9).models) - 3)
