"""Checks of dha."""

from __future__ import annotations

import copy
import math
import statistics
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from regard import models
from regard.adapt.recipe import carry_out
from regard.adapt.stages import Tune, next_token_loss
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.converting import begun, corpus, draws, heads_by_hand, shaken, streamed, student_of, tiny_bits, turned
from regard.lab.checks.shared.decoding import llama, taught
from regard.lab.verification import check
from regard.zoo.systems.dha import FusedHeads, FusionLoss, Plan, fold_dha, fusing, fusion_loss, search, to_dha

KEYS, VALUES = (0, 1, 1, 0), (0, 0, 1, 2)
PLAN: Plan = {"key": [KEYS, VALUES], "value": [VALUES, KEYS]}


@check(
    "dha",
    "not fused yet: logits of a Llama with maps of identity equal its own; and text read in pieces, folded, the whole pass",
    below=1e-12,
    control="folded at once",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = llama(heads=8, kv_heads=4), torch.randint(1, 50, (2, 9))
    truth = model(ids, use_cache=False).logits
    to_dha(model, PLAN)
    own = naive.gap(model(ids, use_cache=False).logits, truth)
    folded = fold_dha(model)(ids, use_cache=False).logits
    return max(own, naive.gap(streamed(model, ids)[0], folded)), naive.gap(folded, truth)


def by_hand(layer: Any, x: Tensor, key_of: list[int], value_of: list[int]) -> Tensor:
    """A folded layer's output: query head h reads key head key_of[h] and value head value_of[h]."""
    d, length = layer.head_dim, x.shape[1]
    heads = heads_by_hand(Rows(layer), x)
    outs = []
    for h in range(layer.heads):
        key = heads_by_hand(Rows(layer, key_of[h]), x).turned_k[:, h]
        value = x @ layer.v_proj.weight[value_of[h] * d : value_of[h] * d + d].T
        rows = []
        for i in range(length):
            s = (key[:, : i + 1] * heads.turned_q[:, h, i : i + 1]).sum(-1) / math.sqrt(d)
            rows.append((torch.stack([naive.softmax(r) for r in s])[..., None] * value[:, : i + 1]).sum(1))
        outs.append(torch.stack(rows, 1))
    return torch.cat(outs, -1) @ layer.o_proj.weight.T


class Rows:
    """A layer as `heads_by_hand` reads it, of one key head."""

    def __init__(self, layer: Any, key: int = 0):
        d = layer.head_dim
        self.head_dim, self.q_proj = d, layer.q_proj
        self.k_proj = self.v_proj = SimpleNamespace(weight=layer.k_proj.weight[key * d : key * d + d])


@check(
    "dha",
    "a folded layer with maps of its own for keys and values equals loops over heads; and gradients",
    below=1e-10,
    control="values by the map of keys",
)
def _() -> tuple[float, float]:
    model = llama(heads=8, kv_heads=4)
    conversion = to_dha(model, PLAN)
    fold_dha(model)
    layer, x = shaken(student_of(conversion), 0.3), torch.randn(2, 6, 32, dtype=F64, requires_grad=True)
    keys, values = [KEYS[h // 2] for h in range(8)], [VALUES[h // 2] for h in range(8)]
    found = layer(x, turned(model, x), None)[0]
    leaves = (x, layer.q_proj.weight, layer.o_proj.weight, layer.k_proj.weight, layer.v_proj.weight)
    other = naive.gap(found, by_hand(layer, x, keys, keys))
    return gap_with_gradients(found, by_hand(layer, x, keys, values), leaves), other


def mixed(model: Any, equal: bool) -> None:
    """Random mixtures, those of a group's members the same if they are to be."""
    for part in model.modules():
        if isinstance(part, FusedHeads):
            rows = torch.randn(max(part.groups) + 1, len(part.groups), dtype=F64)
            part.mix.data = rows[list(part.groups)] if equal else torch.randn_like(part.mix)


@check(
    "dha",
    "members of each group the same mixture: folded logits equal the unfolded; L_f is 0; bytes of the cache are (Hk + Hv) d a token",
    below=1e-10,
    control="mixtures of their own",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    gaps, ids = [], torch.randint(1, 50, (2, 9))
    for equal in (True, False):
        model = llama(heads=8, kv_heads=4)
        to_dha(model, PLAN)
        mixed(model, equal)
        loss, before = fusion_loss(model), model(ids, use_cache=False).logits
        after, cache = streamed(fold_dha(model), ids)
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        wrong = abs(kept - sum(max(KEYS) + 1 + max(VALUES) + 1 for _ in range(2)) * 4 * 9 * 2 * 8)
        gaps.append(naive.gap(after, before) + wrong + (float(loss) if equal else 0.0))
    return gaps[0], gaps[1]


@check(
    "dha",
    "equal contiguous groups for keys and values: logits of a Llama with that many key heads, of mean weights",
    below=1e-10,
    control="groups of neighbours but one",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    gaps, ids = [], torch.randint(1, 50, (2, 9))
    for groups in ((0, 0, 1, 1), (0, 1, 0, 1)):
        model, grouped = llama(heads=4, kv_heads=4), llama(heads=4, kv_heads=2)
        state = model.state_dict()
        for name, x in state.items():
            if "k_proj" in name or "v_proj" in name:
                state[name] = x.view(2, 2, 8, 32).mean(1).flatten(0, 1)
        grouped.load_state_dict(state)
        to_dha(model, {"key": [groups] * 2, "value": [groups] * 2})
        gaps.append(naive.gap(fold_dha(model)(ids, use_cache=False).logits, grouped(ids, use_cache=False).logits))
    return gaps[0], gaps[1]


def relative(model: Any, plan: Plan, ids: Tensor) -> float:
    truth = model(ids, use_cache=False).logits
    copied = copy.deepcopy(model)
    to_dha(copied, plan)
    return float((fold_dha(copied)(ids, use_cache=False).logits - truth).norm() / truth.norm())


@check(
    "dha",
    "8 heads of 3 distinct keys and 2 distinct values, shuffled: relative error of logits after search and fold, by weights and on texts",
    below=1e-10,
    control="contiguous groups of two and of four",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = llama(heads=8, kv_heads=8), torch.randint(1, 50, (2, 12))
    keys, values = (0, 1, 0, 2, 1, 2, 0, 0), (0, 1, 1, 0, 1, 0, 0, 1)
    for layer in model.model.layers:
        for linear, groups in ((layer.self_attn.k_proj, keys), (layer.self_attn.v_proj, values)):
            rows = linear.weight.unflatten(0, (8, -1))
            linear.weight.copy_(rows[[groups.index(g) for g in groups]].flatten(0, 1))
    own = 0.0
    for given in (None, ids):
        for options in ({"key_heads": [3, 3], "value_heads": [2, 2]}, {"total": 10}):
            plan = search(model, ids=given, **options)
            if plan != {"key": [keys] * 2, "value": [values] * 2}:
                return math.inf, 0.0
            own = max(own, relative(model, plan, ids))
    pairs, fours = (0, 0, 1, 1, 2, 2, 3, 3), (0, 0, 0, 0, 1, 1, 1, 1)
    return own, min(relative(model, {"key": [g] * 2, "value": [g] * 2}, ids) for g in (pairs, fours))


@check(
    "dha",
    "L_f of drawn mixtures and the gradients of the training loss, multipliers climbing, equal loops",
    below=1e-10,
    control="multipliers that fall",
)
def _() -> tuple[float, float]:
    model, ids = llama(heads=8, kv_heads=4), torch.randint(1, 50, (2, 7))
    conversion = to_dha(model, PLAN)
    mixed(model, False)
    multipliers = student_of(conversion).multipliers
    multipliers.data = torch.tensor([0.3, 0.7], dtype=F64)

    def penalty() -> Tensor:
        groups = []
        for part in model.modules():
            for number in range(max(part.groups) + 1 if isinstance(part, FusedHeads) else 0):
                members = [i for i, g in enumerate(part.groups) if g == number]
                pairs = [
                    sum((part.mix[a, j] - part.mix[b, j]) ** 2 for j in members) for n, a in enumerate(members) for b in members[n + 1 :]
                ]
                groups += [torch.stack(pairs).mean()] if pairs else []
        return torch.stack(groups).mean()

    mixtures = tuple(p for name, p in model.named_parameters() if name.endswith(".mix"))
    own = gap_with_gradients(fusion_loss(model), penalty(), mixtures)
    found = torch.autograd.grad(FusionLoss(0.4, 5.0)(model, ids), (multipliers, *mixtures))
    gap = penalty() - 0.4
    task = next_token_loss(model(ids, use_cache=False).logits, ids)
    other = torch.autograd.grad(task + 5 * (0.3 * gap + 0.7 * gap**2), mixtures)
    gap = gap.detach()
    climb = torch.stack((gap, gap**2))
    own = max(own, naive.gap(found[0], -climb), *[naive.gap(a, b) for a, b in zip(found[1:], other, strict=True)])
    return own, naive.gap(found[0], climb)


def repeated(generator: torch.Generator) -> Tensor:
    half = torch.randint(1, 20, (16, 8), generator=generator)
    return torch.cat((half, half), 1)


def fused(seed: int) -> tuple[float, float, float]:
    """Loss of a small model after fusing and folding, after folding at once, and the last L_f."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = llama(vocab=20, heads=4, kv_heads=4).float()
    for p in model.parameters():
        p.data.mul_(0.25 if p.dim() > 1 else 1)
    taught(model, lambda: repeated(generator), 400, 5e-3).requires_grad_(True)
    ids = repeated(torch.Generator().manual_seed(99))

    @torch.no_grad()
    def loss(model: Any) -> float:
        return float(next_token_loss(model(ids, use_cache=False).logits[:, 7:], ids[:, 7:]))

    plan = search(model, total=8, ids=ids)
    pooled = copy.deepcopy(model)
    to_dha(pooled, plan)
    conversion = to_dha(model, plan)
    carry_out(conversion, fusing(60, 100), repeated)
    last = fusion_loss(model).item()
    return loss(fold_dha(model)), loss(fold_dha(pooled)), last


@check(
    "dha",
    "a small model that copies, 8 of 16 heads left, fused in 160 steps to L_f < 1e-4 and folded: loss, mean of three seeds",
    below=0.3,
    control="the same groups' means at once",
)
def _() -> tuple[float, float]:
    runs = [fused(seed) for seed in range(3)]
    if max(last for _, _, last in runs) >= 1e-4:
        return math.inf, 0.0
    return statistics.mean(own for own, _, _ in runs), statistics.mean(pooled for _, pooled, _ in runs)


@check(
    "dha",
    "the tiny model, 24 of 32 heads left, means of groups and 12 steps of training: bits per byte beyond its own",
    below=1.0,
    control="groups of other heads",
)
def _() -> tuple[float, float]:
    def bits(turn: int) -> float:
        model = models.load("tiny")
        plain, ids = tiny_bits(model), begun(corpus().batch(4, 63, torch.Generator().manual_seed(0)))
        plan = search(model, total=24, ids=ids)
        plan = {kind: [renumbered(groups[turn:] + groups[:turn]) for groups in all_] for kind, all_ in plan.items()}
        conversion = to_dha(model, plan)
        fold_dha(model)
        carry_out(conversion, [Tune(12, 1e-3, ("*self_attn*",))], draws(2, 96))
        return tiny_bits(model) - plain

    return bits(0), bits(1)


def renumbered(groups: tuple[int, ...]) -> tuple[int, ...]:
    order = list(dict.fromkeys(groups))
    return tuple(order.index(g) for g in groups)
