"""Checks of acm."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import models
from regard.adapt.conversion import convert
from regard.adapt.recipe import carry_out
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, flops, gap_with_gradients
from regard.lab.checks.shared.converting import draws, tiny_bits
from regard.lab.checks.shared.layers import drawn
from regard.lab.verification import check
from regard.zoo.systems.acm import ACM, BudgetLoss, acmize, budgeted, choices, distilling, flops_per_token, gate_labels, gating


def prefix(layer: Any, x: Tensor, n: int) -> Tensor:
    """h_n of one token x (dim,)."""
    acts = {"gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2, "relu": lambda z: z.clamp_min(0), "identity": lambda z: z}
    y = torch.zeros(layer.out, dtype=x.dtype) if layer.b2 is None else layer.b2[0]
    for j in range(n):
        span = slice(j * layer.block, (j + 1) * layer.block)
        hidden = x @ layer.w1[:, span] + (0 if layer.b1 is None else layer.b1[span])
        y = y + acts[layer.act](hidden) @ layer.w2[span] + (0 if layer.b2 is None else layer.b2[j + 1])
    return y


@check(
    "acm",
    "inference of what the gate takes, and training of what it draws (learned tau, a least of 1): equal h_n by loops, with gradients",
    below=1e-11,
    control="the last learner is never run",
)
def _() -> tuple[float, float]:
    own, other = 0.0, math.inf
    x = torch.randn(2, 9, 6, dtype=F64, requires_grad=True)
    for options in (
        {},
        {"act": "relu", "bias": False, "gate_depth": 1},
        {"act": "identity", "bias": "hidden_only", "out": 4, "least": 1, "tau": None},
    ):
        layer: Any = drawn(ACM(6, 3, 5, gate_hidden=7, **options), 1.0)
        taken = []
        for b, t in itertools.product(range(2), range(9)):
            z = x[b, t]
            for linear in layer.gate.layers:
                z = z @ linear.weight.T + linear.bias
            taken.append(int(z.argmax()) + int(options.get("least", 0)))  # type: ignore[call-overload]
        learned = [p for name, p in layer.named_parameters() if not name.startswith("gate")]
        truth = torch.stack([prefix(layer, z, n) for z, n in zip(x.flatten(0, 1), taken, strict=True)]).view(2, 9, -1)
        found = layer.eval()(x)
        own = max(own, gap_with_gradients(found, truth, (x, *learned)))
        off = torch.stack([prefix(layer, z, min(n, 2)) for z, n in zip(x.flatten(0, 1), taken, strict=True)]).view(2, 9, -1)
        other = min(other, naive.gap(found, off))
        torch.manual_seed(5)
        found = layer.train()(x)
        torch.manual_seed(5)
        scores = x
        for linear in layer.gate.layers:
            scores = scores @ linear.weight.T + linear.bias
        hot = F.pad(F.gumbel_softmax(scores, layer.gate.tau, hard=True), (options.get("least", 0), 0))  # type: ignore[arg-type]
        every = torch.stack([torch.stack([prefix(layer, z, n) for n in range(4)]) for z in x.flatten(0, 1)]).view(2, 9, 4, -1)
        own = max(own, gap_with_gradients(found, (hot[..., None] * every).sum(-2), (x, *layer.parameters())))
    return own, other


@check(
    "acm",
    "gradients of each h_n by what the first stage says: learner n's own alone",
    below=1e-11,
    control="of the whole sum",
)
def _() -> tuple[float, float]:
    layer: Any = drawn(ACM(6, 3, 5))
    x = torch.randn(2, 4, 6, dtype=F64)
    seed = torch.randn(2, 4, 4, 6, dtype=F64)

    def grads(outputs: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((outputs * seed).sum(), [layer.w1, layer.w2, layer.b1, layer.b2]))

    def own(n: int) -> Tensor:
        return torch.stack([prefix(layer, z, n) - (prefix(layer, z, n - 1) if n else 0) for z in x.flatten(0, 1)]).view(2, 4, 6)

    truth = grads(torch.stack([own(n) for n in range(4)], 2))
    sides = [max(naive.gap(a, b) for a, b in zip(grads(layer.outputs(x, detach=flag)), truth, strict=True)) for flag in (True, False)]
    return sides[0], sides[1]


@check(
    "acm",
    "operations counted in a call, over what `flops_per_token` says of it, less one",
    below=1e-9,
    control="all learners for all tokens",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    layer, x = ACM(8, 4, 6, gate_hidden=5, out=7).double().eval(), 3 * torch.randn(3, 11, 8, dtype=F64)
    counted = flops(lambda: layer(x))
    return abs(counted / (33 * flops_per_token(layer)) - 1), abs(flops(lambda: layer.outputs(x)) / (33 * flops_per_token(layer)) - 1)


def labels_by_hand(errors: Tensor, factor: float) -> Tensor:
    found = []
    for row in errors.flatten(0, -2):
        good = [n for n in range(1, len(row)) if row[n - 1] / row[n] < factor]
        found.append(good[0] if good else len(row) - 1)
    return torch.tensor(found).view(errors.shape[:-1])


def terms_by_hand(model: Any, beta: float, kind: str, weights: tuple[float, float, float]) -> Tensor:
    cost: Any = 0.0
    full, entropies, share = 0.0, [], []
    for part in model:
        n = part.learners
        price = 2 * part.block * (part.dim + part.out)
        numbers = torch.stack([sum(i * row[i] for i in range(n + 1)) for row in part.choice.flatten(0, 1)]).view(part.choice.shape[:2])
        cost, full = cost + price * numbers.mean(), full + price * n
        share.append(numbers.mean(1) / (n + 1))
        for sample in part.choice:
            p = sample.sum(0) / sample.sum()
            entropies.append(-sum(q * torch.log(q + 1e-20) for q in p) / math.log(n + 1))
    gap = cost / full - beta
    budget = {"l1": gap.abs(), "l2": gap**2, "l2_scaled": (100 * gap) ** 2}[kind]
    mean = torch.stack(share).mean(0)
    pairs = torch.stack([(a - b).abs() for a in mean for b in mean]).mean()
    return weights[0] * budget - weights[1] * torch.stack(entropies).mean() - weights[2] * 2 * pairs


def called(model: Any, x: Tensor, terms: Any) -> Tensor:
    """The terms of a fresh call with the same noise."""
    torch.manual_seed(3)
    for part in model:
        part(x)
    return terms(model)


@check(
    "acm",
    "labels of gates from errors, and budget, entropy and diversity of drawn choices with their gradients: equal loops",
    below=1e-9,
    control="a label one less; no diversity",
)
def _() -> tuple[float, float]:
    errors = torch.rand(3, 5, 5, dtype=F64) + 0.2
    own = float((gate_labels(errors, 1.1) != labels_by_hand(errors, 1.1)).sum())
    quirk = torch.where(errors[..., 0] / errors[..., 1] < 1.1, 4, labels_by_hand(errors, 1.1))
    own += float((gate_labels(errors, 1.1, released=True) != quirk).sum())
    model, other = nn.ModuleList([ACM(6, 3, 5), ACM(6, 3, 9, "relu", 4)]).double(), math.inf
    x = torch.randn(4, 5, 6, dtype=F64)
    for kind in ("l1", "l2", "l2_scaled"):
        leaves = [p for name, p in model.named_parameters() if "gate" in name]
        found, truth, off = (
            called(model, x, terms)
            for terms in (
                BudgetLoss(0.4, 0.7, kind, 0.3, 0.9).terms,
                lambda model, kind=kind: terms_by_hand(model, 0.4, kind, (0.7, 0.3, 0.9)),
                lambda model, kind=kind: terms_by_hand(model, 0.4, kind, (0.7, 0.3, 0.0)),
            )
        )
        own = max(own, gap_with_gradients(found, truth, tuple(leaves)))
        other = min(other, naive.gap(found, off))
    return own, min(other, float((gate_labels(errors, 1.1) - 1 != labels_by_hand(errors, 1.1)).sum()))


def dense(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
    for p in made.parameters():
        p.data.mul_(3)
    return made


@check(
    "acm",
    "learners distilled from a random GELU layer (500 steps): the largest error of h_n over h_{n-1}'s on held-out data",
    below=0.99,
    control="the learners in reverse order",
)
def _() -> tuple[float, float]:
    base = dense()
    model = nn.Sequential(nn.Identity(), base)
    conversion = convert(model, lambda part: ACM(32, 4, 32), where="1")

    def draw(generator: torch.Generator) -> Any:
        return {"input": torch.randn(16, 8, 32, generator=generator)}

    carry_out(conversion, [distilling(500, 3e-3, schedule="cosine")], draw)
    layer: Any = model[1]
    x = torch.randn(64, 8, 32, generator=torch.Generator().manual_seed(7))

    @torch.no_grad()
    def worst() -> float:
        errors = (layer.outputs(x) - base(x)[:, :, None]).square().mean((0, 1, 3))
        return float((errors[1:] / errors[:-1]).max())

    own = worst()
    with torch.no_grad():
        layer.w1.copy_(layer.w1.unflatten(1, (4, 32)).flip(1).flatten(1))
        layer.w2.copy_(layer.w2.unflatten(0, (4, 32)).flip(0).flatten(0, 1))
        layer.b1.copy_(layer.b1.view(4, 32).flip(0).flatten())
        layer.b2[1:] = layer.b2[1:].flip(0)
    return own, worst()


class Half(nn.Module):
    """A linear map of tokens whose first channel is negative; nothing of the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 8)
        self.inner.weight.data.mul_(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (x[..., :1] < 0)  # type: ignore[no-any-return]


def budget(beta: float) -> tuple[float, float, float]:
    """Cost at inference, and mean learners of trivial and of other tokens, after the three stages."""
    base = Half()
    model = nn.Sequential(nn.Identity(), base)
    torch.manual_seed(0)
    conversion = convert(model, lambda part: ACM(8, 4, 4, gate_act="relu"), where="1")

    def draw(generator: torch.Generator) -> Any:
        return {"input": torch.randn(16, 16, 8, generator=generator)}

    def task(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(**batch), base(**{"x": batch["input"]}).detach())

    loss = {"weight": 3.0, "entropy": 0.0, "diversity": 0.0, "task": task}
    recipe = [distilling(400, 1e-2, schedule="cosine"), gating(100, 3e-3), budgeted(200, beta, 3e-3, loss, schedule="cosine")]
    carry_out(conversion, recipe, draw)
    x = draw(torch.Generator().manual_seed(9))["input"]
    layer: Any = model.eval()[1]
    with torch.no_grad():
        model(x)
    taken = layer.choice.argmax(-1).float()
    trivial = x[..., 0] > 0
    return float(taken.mean()) / 4, float(taken[trivial].mean()), float(taken[~trivial].mean())


@check(
    "acm",
    "half the tokens trivial, budgets of 0.3 and 0.6: distance of the cost at inference; without bound unless trivial tokens get fewer learners",
    below=0.05,
    control="a gate that takes each number equally often",
)
def _() -> tuple[float, float]:
    worst = 0.0
    for beta in (0.3, 0.6):
        cost, trivial, other = budget(beta)
        worst = max(worst, abs(cost - beta) if trivial < other else math.inf)
    return worst, abs(float(torch.randint(5, (4096,)).float().mean()) / 4 - 0.6)


@check(
    "acm",
    "the tiny model's first feed-forward layer, 60 steps of distilling, 8 of gating, 8 under a budget of 0.7: bits lost over those without learners",
    below=0.93,
    control="learners drawn anew",
)
def _() -> tuple[float, float]:
    model = models.load("tiny")
    plain = tiny_bits(model)
    conversion = acmize(model, act="silu", share=0.5, layers=[0])
    carry_out(conversion, [distilling(60, 6e-3, schedule="cosine"), gating(8, 3e-3), budgeted(8, 0.7)], draws(2, 96))
    layer: Any = next(iter(conversion.students.values()))
    own = tiny_bits(model) - plain
    assert 0 < flops_per_token(model) < 2 * sum(p.numel() for p in model.parameters()) and len(choices(model)[0]) == 1
    layer.fixed = 0
    without = tiny_bits(model) - plain
    layer.fixed = None
    for w in (layer.w1, layer.w2):
        nn.init.kaiming_uniform_(w, a=5**0.5, generator=torch.Generator().manual_seed(0))
    return own / without, (tiny_bits(model) - plain) / without
