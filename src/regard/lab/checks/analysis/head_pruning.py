"""Checks of head-pruning."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import models
from regard.interpret import ablated, importance, prune
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.heads import mixers, next_accuracy, next_loss, source
from regard.lab.verification import check
from regard.nn.decoder import Decoder
from regard.zoo.analysis.head_pruning import ablation_table, best_heads, evaluated, prune_schedule


def small() -> Decoder:
    return Decoder(vocab=30, dim=32, layers=3, heads=4, kv_heads=2).to(F64).eval()


def by_hand(model: Decoder, batches: list[Tensor], per: str, normal: bool, last: bool) -> Tensor:
    """sum |context . gradient| of what goes into each output projection, read with plain hooks."""
    total, tokens, examples = torch.zeros(3, 4, dtype=F64), 0, 0
    for ids in batches:
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            args[0].retain_grad()
            kept.append(args[0])  # noqa: B023

        hooks = [mixer.out.register_forward_pre_hook(keep) for mixer in mixers(model)]
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        for hook in hooks:
            hook.remove()
        for layer, x in enumerate(kept):
            slope = cast(Tensor, x.grad)
            for h in range(4):
                at = slice(8 * h, 8 * h + 8)
                for b in range(len(ids)):
                    dots = [float(x[b, t, at].detach() @ slope[b, t, at]) for t in range(ids.shape[1])]
                    total[layer, h] += sum(abs(d) for d in dots) if per == "token" else abs(sum(dots))
        tokens, examples = tokens + ids.numel(), examples + len(ids)
    counts = torch.full((3, 1), float(tokens if per == "token" else examples), dtype=F64)
    if last:
        counts[-1] = examples
    total = total / counts
    return total / (total.square().sum(-1, keepdim=True).sqrt() + 1e-20) if normal else total


@check(
    "head-pruning",
    "importance by token and by example, layers normalised or not, last layer by examples: |context . gradient| by hand",
    below=1e-10,
    control="the absolute value behind the sum over tokens",
)
def _() -> tuple[float, float]:
    model = small()
    batches = [torch.randint(30, (2, 7)), torch.randint(30, (3, 5))]

    def loss(ids: Tensor) -> Tensor:
        return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def found(**options: Any) -> Tensor:
        return importance(model, batches, loss, **options).scores

    own = [
        naive.gap(found(), by_hand(model, batches, "token", True, True)),
        naive.gap(found(normalise=None, last_layer="tokens"), by_hand(model, batches, "token", False, False)),
        naive.gap(found(normalise=None), by_hand(model, batches, "token", False, True)),
        naive.gap(found(normalise=None, per="example"), by_hand(model, batches, "example", False, True)),
    ]
    return max(own), naive.gap(found(per="example", normalise=None), found(normalise=None, last_layer="examples"))


@check(
    "head-pruning",
    "heads taken out: outputs, steps and gradients of regard's decoder are the masked model's; parameters fall by 2 (d + d) d_h a pair",
    below=1e-12,
    control="other heads of the same layers taken out",
)
def _() -> tuple[float, float]:
    model, ids = small(), torch.randint(30, (2, 9))
    heads = [(0, 0), (0, 1), (2, 1), (2, 3)]
    with ablated(model, heads):
        truth = model(ids)
    gaps = []
    for chosen in (heads, [(0, 2), (0, 3), (2, 0), (2, 2)]):
        smaller = copy.deepcopy(model)
        gone = prune(smaller, chosen)
        # layer 0 loses a key head with its two query heads, layer 2 two query heads of two groups
        right = gone == (2 * 32 * 8 * 2 + 2 * 32 * 8) + 2 * 32 * 8 * 2
        stepped, state = smaller.step(ids[:, :4])
        rest = [stepped]
        for t in range(4, 9):
            out, state = smaller.step(ids[:, t : t + 1], state)
            rest.append(out)
        gap = max(naive.gap(smaller(ids), truth), naive.gap(torch.cat(rest, 1), truth))
        slopes = []
        for one, mask in ((smaller, []), (model, heads)):
            with ablated(one, mask) if mask else torch.enable_grad():
                slopes.append(torch.autograd.grad(one(ids).square().sum(), one.embed.weight)[0])
        gaps.append(max(gap, naive.gap(*slopes)) if right else 1.0)
    return gaps[0], gaps[1]


@check(
    "head-pruning",
    "tiny model with 10 of 32 heads planted dead: dead heads not among the 10 least important, and change of the loss without them",
    below=1e-6,
    control="the 10 heads whose query rows are shortest, dead heads missed",
)
def _() -> tuple[float, float]:
    model, ids = models.load("tiny"), source(2, 192)
    dead = {(layer, head) for layer, head in zip([0, 0, 1, 1, 1, 2, 2, 3, 3, 3], [1, 6, 6, 7, 0, 6, 1, 2, 7, 4], strict=True)}
    norms = []
    for layer, block in enumerate(model.model.layers):
        for head in range(8):
            norms.append((float(block.self_attn.q_proj.weight[32 * head : 32 * head + 32].detach().norm()), (layer, head)))
            if (layer, head) in dead:
                block.self_attn.o_proj.weight.data[:, 32 * head : 32 * head + 32] = 0
    least = importance(model, [ids], lambda x: next_loss(model, x)).ranked(ascending=True)[:10]

    def cost(heads: list[tuple[int, int]]) -> float:
        return abs(
            evaluated(model, lambda: float(next_loss(model, ids)), heads) - evaluated(model, lambda: float(next_loss(model, ids)), [])
        )

    return len(dead - set(least)) + cost(least), len(dead - {at for _, at in sorted(norms)[:10]})


@check(
    "head-pruning",
    "tiny model on source code: bytes predicted right without the 10 least important of 32 heads, over those with all",
    above=0.9,
    control="without the 10 most important",
)
def _() -> tuple[float, float]:
    model, ids = models.load("tiny"), source(2, 384)
    scores = importance(model, [ids], lambda x: next_loss(model, x))

    def right() -> float:
        return next_accuracy(model, ids)

    schedule = prune_schedule(model, scores, right, step=10 / 32, until=10 / 32)
    whole, least = schedule.rounds[0].value, schedule.rounds[-1]
    consistent = len(least.removed) == 10 and list(least.removed) == scores.ranked(ascending=True)[:10]
    return least.value / whole if consistent else 0.0, evaluated(model, right, scores.top(10)) / whole


@check("head-pruning", "one head gone, one head left: equal masked weights of the output projection", below=1e-12, control="the next head")
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = small(), torch.randint(30, (2, 9))

    def masked(layer: int, heads: list[int]) -> float:
        other = copy.deepcopy(model)
        for head in heads:
            mixers(other)[layer].out.weight[:, 8 * head : 8 * head + 8] = 0
        return float(other(ids).square().sum())

    def value() -> float:
        return float(model(ids).square().sum())

    single, left = ablation_table(model, value).scores, best_heads(model, value, 1).scores[0]
    truth = torch.tensor([[masked(layer, [head]) for head in range(4)] for layer in range(3)], dtype=F64)
    alone = torch.tensor([masked(1, [other for other in range(4) if other != head]) for head in range(4)], dtype=F64)
    return max(naive.gap(single, truth), naive.gap(left, alone)), naive.gap(single.roll(1, 1), truth)
