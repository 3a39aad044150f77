"""Checks of atlas."""

from __future__ import annotations

import copy
import math
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.adapt.task_vectors import TaskVectors
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.zoo.systems.atlas import Atlas, adaptation_loss, interference, negation_loss, penalty, trusted


class Net(nn.Module):
    """An attention block and an MLP block on (B, L, 8), read by a head of 3 classes; a buffer that composition leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.head = Attention(8, 2), nn.LayerNorm(8), nn.Linear(8, 3)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.register_buffer("shift", torch.full((8,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x + self.get_buffer("shift")))
        return self.head(x + self.mlp(x))  # type: ignore[no-any-return]


def models(count: int = 2) -> tuple[nn.Module, list[nn.Module]]:
    base = Net().double()
    return base, [drawn(copy.deepcopy(base)) for _ in range(count)]


def groups_of(base: nn.Module, parts: int) -> dict[tuple[int, ...], Tensor]:
    return {tuple(p.shape): torch.randint(parts, p.shape) for p in base.parameters()}


def by_hand(base: nn.Module, tuned: list[nn.Module], own: Tensor, groups: dict[tuple[int, ...], Tensor] | None = None) -> nn.Module:
    """A model whose every entry is theta_0 + sum_i l (theta_i - theta_0)."""
    made = copy.deepcopy(base)
    for j, (name, p) in enumerate(made.named_parameters()):
        start, total = p.detach().clone(), p.detach().clone()
        for i, other in enumerate(tuned):
            tau = other.get_parameter(name).detach() - start
            for at in range(total.numel()):
                k = int(groups[tuple(p.shape)].flatten()[at]) if groups else 0
                total.view(-1)[at] += float(own[i, j, k] if groups else own[i, j] if own.dim() == 2 else own[i]) * tau.flatten()[at]
        p.data = total
    return made


@check(
    "atlas",
    "coefficients 0, one vector at 1, and drawn ones (blocks, 3 groups, one a vector): outputs, and the merged weights', == entries by loops",
    below=1e-12,
    control="each block with its neighbour's coefficients",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    base, tuned = models()
    x, vectors, groups = torch.randn(2, 5, 8, dtype=F64), TaskVectors(base, tuned), groups_of(base, 3)
    gaps, other, m = [], math.inf, len(list(base.parameters()))
    plain = Atlas(base, vectors)
    gaps += [naive.gap(plain(x), base(x)), float(plain.coefficients.shape != (2, m))]
    for i in range(2):
        plain.coefficients.zero_()[i] = 1
        gaps.append(naive.gap(plain(x), tuned[i](x)))
    for made in (plain, Atlas(base, vectors, partition=3, groups=groups, matrices=False), Atlas(base, vectors, isotropic=True)):
        made.coefficients.copy_(torch.randn_like(made.coefficients))
        truth = by_hand(base, tuned, made.coefficients, groups if made.partition else None)
        fresh = Net().double()
        fresh.load_state_dict(made.merge())
        gaps += [naive.gap(made(x), truth(x)), naive.gap(fresh(x), truth(x))]
        if made.coefficients.dim() > 1:
            other = min(
                other, naive.gap(made(x), by_hand(base, tuned, made.coefficients.roll(1, 1), groups if made.partition else None)(x))
            )
    trainable = sum(p.numel() for p in Atlas(base, vectors, partition=3).parameters() if p.requires_grad)
    return max(*gaps, float(trainable != 2 * m * 3)), other


@check(
    "atlas",
    "gradient of a coefficient == inner product of the loss's gradient at its weights and the task vector there, of each group",
    below=1e-9,
    control="one inner product a vector, spread over its blocks",
)
def _() -> tuple[float, float]:
    base, tuned = models()
    x, groups = torch.randn(2, 5, 8, dtype=F64), groups_of(base, 2)
    made = Atlas(base, TaskVectors(base, tuned), partition=2, groups=groups, matrices=False)
    made.coefficients.data.normal_(std=0.5)
    made(x).square().sum().backward()
    whole = by_hand(base, tuned, made.coefficients.detach(), groups)
    whole(x).square().sum().backward()
    truth = torch.zeros_like(made.coefficients)
    for j, (name, p) in enumerate(whole.named_parameters()):
        for i, k in ((i, k) for i in range(2) for k in range(2)):
            tau = tuned[i].get_parameter(name).detach() - base.get_parameter(name).detach()
            truth[i, j, k] = float((p.grad * tau)[groups[tuple(p.shape)] == k].sum())  # type: ignore[operator]
    spread = truth.mean((1, 2), keepdim=True).expand_as(truth)
    assert made.coefficients.grad is not None
    return naive.gap(made.coefficients.grad, truth), naive.gap(spread, truth)


@check(
    "atlas",
    "one vector helps in attention and harms in the MLP, the other the reverse: learned loss over the best pair of whole-vector scales",
    below=0.01,
    control="one coefficient a vector, learned alike",
)
def _() -> tuple[float, float]:
    base, (target, _) = models()
    x = torch.randn(64, 5, 8, dtype=F64)
    goal, halves = target(x).detach(), []
    for helps in ("mix", "mlp"):
        state = {name: p.clone() for name, p in base.state_dict().items()}
        for name, p in target.named_parameters():
            step = p.detach() - state[name]
            if name.startswith(("mix", "mlp")):
                state[name] = state[name] + (step if name.startswith(helps) else 0.5 * torch.randn_like(step))
            else:
                state[name] = state[name] + 0.5 * step
        halves.append(state)
    vectors = TaskVectors(base, halves)

    def loss(made: Atlas) -> Tensor:
        return (made(x) - goal).square().mean()

    def learned(isotropic: bool) -> float:
        made = Atlas(base, vectors, isotropic=isotropic)
        optimizer = torch.optim.AdamW([made.coefficients], 0.1, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
        for _ in range(200):
            optimizer.zero_grad()
            loss(made).backward()
            optimizer.step()
            schedule.step()
        return float(loss(made).detach())

    grid, best = Atlas(base, vectors, isotropic=True), math.inf
    with torch.no_grad():
        for a in range(0, 41, 2):
            for b in range(0, 41, 2):
                grid.coefficients.copy_(torch.tensor([a, b]) / 20 - 0.5)
                best = min(best, float(loss(grid)))
    return learned(False) / best, learned(True) / best


@check(
    "atlas",
    "linearised: distance to the model falls as the square of the coefficients, |slope - 2| over scales 1e-2 and 1e-3",
    below=0.2,
    control="base's outputs, without the first-order term",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    base, tuned = models()
    x, direction = torch.randn(2, 5, 8, dtype=F64), torch.randn(2, len(list(base.parameters())), dtype=F64)
    full, line = (Atlas(base, TaskVectors(base, tuned), linearised=one) for one in (False, True))

    def far(made: nn.Module, scale: float) -> float:
        for one in (full, line):
            one.coefficients.copy_(scale * direction)
        return float((full(x) - made(x)).norm())

    own, zeroth = (math.log10(far(made, 1e-2) / far(made, 1e-3)) for made in (line, base))
    return abs(own - 2), abs(zeroth - 2)


def few_shot(seed: int) -> tuple[float, float, float, float]:
    """Accuracy from 2 shots a class: aTLAS, a linear probe, all weights, aTLAS from whose pool the task's kin is missing.

    Four clusters in 16 numbers; a model is trained on them, and fine-tuned on each of three turned worlds. The task: the second of these,
    with its centres moved.
    """
    torch.manual_seed(seed)
    centres = 1.5 * F.normalize(torch.randn(4, 16), dim=-1) * 2
    turns = [torch.linalg.qr(torch.randn(16, 16))[0] for _ in range(3)]
    worlds = [centres @ turn for turn in turns]

    def draw(centres: Tensor, each: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(4).repeat_interleave(each)
        return centres[y] + torch.randn(len(y), 16), y

    def learned(model: nn.Module, parameters: list[nn.Parameter], lr: float, data: tuple[Tensor, Tensor], steps: int = 60) -> nn.Module:
        optimizer = torch.optim.AdamW(parameters, lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(data[0]), data[1]).backward()
            optimizer.step()
            schedule.step()
        return model

    def tuned(start: nn.Module, centres: Tensor) -> nn.Module:
        made = copy.deepcopy(start)
        return learned(made, list(made.parameters()), 1e-2, draw(centres, 100))

    base = tuned(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)), centres)
    pool = [tuned(base, world) for world in worlds]
    target = worlds[1] + 0.3 * torch.randn(4, 16)
    shots, (x, y) = draw(target, 2), draw(target, 250)

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(x).argmax(-1) == y).float().mean())

    made, foreign = (Atlas(base, TaskVectors(base, models)) for models in (pool, [pool[0], pool[2]]))
    probe, whole = copy.deepcopy(base), copy.deepcopy(base)
    return (
        accuracy(learned(made, [made.coefficients], 0.1, shots)),
        accuracy(learned(probe, list(probe[2].parameters()), 1e-2, shots)),  # type: ignore[index]
        accuracy(learned(whole, list(whole.parameters()), 1e-2, shots)),
        accuracy(learned(foreign, [foreign.coefficients], 0.1, shots)),
    )


@check(
    "atlas",
    "2 shots a class, a kindred fine-tune in the pool: mean accuracy of 5 seeds above a linear probe's and full fine-tuning's",
    above=0.03,
    control="a pool without the kindred fine-tune",
)
def _() -> tuple[float, float]:
    own, probe, whole, foreign = (statistics.mean(column) for column in zip(*(few_shot(seed) for seed in range(5)), strict=True))
    return own - max(probe, whole), foreign - max(probe, whole)


@check(
    "atlas",
    "losses of adaptation and negation, the penalty, and the trusted samples == by loops over samples",
    below=1e-12,
    control="pseudo-labels without the trusted samples",
)
def _() -> tuple[float, float]:
    weak, strong, first = (3 * torch.randn(12, 4, dtype=F64) for _ in range(3))
    sure, labels = trusted(first, 2), torch.randint(4, (12,))
    kept = {int(i) for c in range(4) for i in sorted(range(12), key=lambda i: -float(first[i, c].exp() / first[i].exp().sum()))[:2]}

    def loop(use: bool) -> Tensor:
        terms = []
        for i in range(12):
            goal = torch.tensor([math.exp(a) for a in weak[i].tolist()], dtype=F64)
            goal = goal / goal.sum()
            if use and i in kept:
                goal = torch.tensor([float(c == int(first[i].argmax())) for c in range(4)], dtype=F64)
            if float(goal.max()) > 0.8:
                terms.append(-(goal * (strong[i] - strong[i].exp().sum().log())).sum())
        return torch.stack(terms).mean()

    def ce(logits: Tensor) -> Tensor:
        return torch.stack([logits[i].exp().sum().log() - logits[i, labels[i]] for i in range(12)]).mean()

    gaps = [
        naive.gap(adaptation_loss(weak, strong, first, sure, above=0.8), loop(True)),
        naive.gap(adaptation_loss(weak, strong, above=0.8), loop(False)),
        naive.gap(negation_loss(weak, labels, strong, labels), ce(strong) - ce(weak)),
        naive.gap(penalty(weak, 0.3, 0.7), sum(0.3 * abs(v) + 0.7 * v * v for v in weak.flatten().tolist()) + torch.zeros((), dtype=F64)),
        float({i for i in range(12) if sure[i]} != kept),
    ]
    return max(gaps), naive.gap(loop(False), loop(True))


@check(
    "atlas",
    "interference of two vectors on a loss == that of the two merged models, and what stays of the strongest blocks is what scores say",
    below=1e-12,
    control="the other vector's task",
)
def _() -> tuple[float, float]:
    base, tuned = models()
    x, y = torch.randn(2, 5, 8, dtype=F64), torch.randn(2, 5, 3, dtype=F64)
    vectors = TaskVectors(base, tuned)
    made = Atlas(base, vectors)

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(x) - y).square().mean())

    both = error(by_hand(base, tuned, torch.ones(2)))
    truth = both - error(tuned[0])
    scores = torch.randn(2, len(vectors.names))
    fewer = vectors.strongest(scores, 3)
    mask = torch.zeros_like(scores, dtype=F64)
    for i in range(2):
        for j in sorted(range(len(vectors.names)), key=lambda j: -abs(float(scores[i, j])))[:3]:
            mask[i, j] = 1
    part = Atlas(base, fewer)
    part.coefficients.data.fill_(1.0)
    gaps = [
        abs(interference(made, error, 0, 1) - truth),
        naive.gap(part(x), by_hand(base, tuned, mask)(x)),
        float(made.coefficients.detach().abs().sum()),
    ]
    made.coefficients.data.copy_(scores)
    order = [name for name, _ in made.report()]
    gaps.append(float(order != sorted(vectors.names, key=lambda n: -float(scores[:, vectors.names.index(n)].abs().max()))))
    return max(gaps), abs(both - error(tuned[1]) - truth)
