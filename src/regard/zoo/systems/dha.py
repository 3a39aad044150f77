"""DHA: each layer has its own number of key heads and, apart from it, of value heads; heads of a trained model are fused into them (id 220; Chen et al., 2024).

O_h = softmax(Q_h K_dk(h)^T / sqrt(d)) V_dv(h)
fusing: member i of a group G keeps W_i <- sum_{j in G} w_ij W_j, w = I at first;   L_f = mean over layers, groups, pairs of sum_j (w_ij - w_i'j)^2
L = L_LM + l1 (L_f - target) + l2 (L_f - target)^2, l1 and l2 by gradient ascent, target from its first value to 0;   then members are one matrix
Not built: trial fusion losses as a measure of likeness (heads are compared by weights, on calibration inputs where these are given).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.adapt.conversion import Conversion, convert
from regard.adapt.grouping import Groups, annealed, distances, merges, numbered, shared_out
from regard.adapt.host import own_attention, shape_of
from regard.adapt.stages import Stage, Tune, next_token_loss
from regard.adapt.student import NORMS, PROJECTIONS, check_layer, turn_of
from regard.catalog.registry import register
from regard.errors import RegardError

Plan = dict[str, list[Groups]]  # "key" and "value": a layer's groups of its heads


class FusedHeads(nn.Module):
    """A projection (heads * d, dim) whose heads are mixtures within groups: x (..., dim) -> (..., heads * d). `mix` (heads, heads)."""

    def __init__(self, linear: nn.Linear, groups: Groups):
        super().__init__()
        heads = len(groups)
        self.weight, self.bias, self.groups = linear.weight, linear.bias, groups
        self.mix = nn.Parameter(torch.eye(heads).to(linear.weight))
        same = torch.tensor(groups)[:, None] == torch.tensor(groups)
        self.register_buffer("same", same.to(linear.weight.device), persistent=False)

    def mixed(self) -> tuple[Tensor, Tensor | None]:
        w = self.mix * self.same  # type: ignore[operator]
        heads = len(self.groups)
        weight = torch.einsum("ij,jrc->irc", w, self.weight.unflatten(0, (heads, -1))).flatten(0, 1)
        return weight, None if self.bias is None else (w @ self.bias.unflatten(0, (heads, -1))).flatten()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.mixed())

    def penalty(self) -> list[Tensor]:
        """sum_j (w_ij - w_i'j)^2 of each pair of members of each group: a tensor a group of two or more."""
        found = []
        for number in range(max(self.groups) + 1):
            rows = self.mix[[i for i, g in enumerate(self.groups) if g == number]] * self.same[self.groups.index(number)]  # type: ignore[index]
            if len(rows) > 1:
                first, second = torch.triu_indices(len(rows), len(rows), 1)
                found.append((rows[first] - rows[second]).square().sum(-1))
        return found

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """One matrix a group, the mean of its members."""
        weight, bias = self.mixed()
        heads, many = len(self.groups), max(self.groups) + 1
        share = F.one_hot(torch.tensor(self.groups), many).T.to(weight)
        share = share / share.sum(1, keepdim=True)
        rows = torch.einsum("gi,irc->grc", share, weight.unflatten(0, (heads, -1))).flatten(0, 1)
        plain = nn.Linear(rows.shape[1], rows.shape[0], bias is not None, device=rows.device, dtype=rows.dtype)
        plain.weight.copy_(rows)
        if bias is not None:
            plain.bias.copy_((share @ bias.unflatten(0, (heads, -1))).flatten())
        return plain


class DHAAttention(nn.Module):
    """An attention layer of a transformers decoder with maps from query heads to key heads and to value heads; its cache keeps as many of each
    as there are. Before `fold` all heads are there, as mixtures. A layer's own key heads are what is grouped."""

    def __init__(self, layer: nn.Module, key_groups: Groups, value_groups: Groups):
        super().__init__()
        host: Any = layer
        check_layer(host)
        self.config, self.layer_idx, self.is_causal, self.num_key_value_groups = host.config, host.layer_idx, True, 1
        self.heads, kv_heads, self.head_dim = shape_of(host)
        for name, groups in (("key", key_groups), ("value", value_groups)):
            if len(groups) != kv_heads or numbered(groups) != tuple(groups):
                raise RegardError(
                    f"{name} groups {groups}: expected the group of each of {kv_heads} heads, numbered in order of first members"
                )
        self.scaling, self.attention_dropout = getattr(host, "scaling", self.head_dim**-0.5), getattr(host, "attention_dropout", 0.0)
        for name in (*PROJECTIONS, *(name for name in NORMS if hasattr(host, name))):
            setattr(self, name, copy.deepcopy(getattr(host, name)))
        for name, groups in (("k_proj", key_groups), ("v_proj", value_groups)):
            setattr(self, name, FusedHeads(getattr(self, name), groups))
        self.turn, self.kind = turn_of(host), type(host)
        whole = torch.arange(self.heads) // (self.heads // kv_heads)
        self.register_buffer("key_map", whole, persistent=False)  # query head -> key head
        self.register_buffer("value_map", whole.clone(), persistent=False)

    def fold(self) -> None:
        """Members of a group become one head, and the maps point to it."""
        for name, attribute in (("k_proj", "key_map"), ("v_proj", "value_map")):
            fused = getattr(self, name)
            if isinstance(fused, FusedHeads):
                setattr(self, attribute, torch.tensor(fused.groups, device=fused.weight.device)[getattr(self, attribute)])
                setattr(self, name, fused.folded())

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Any = None, **given: Any
    ) -> tuple[Tensor, Any]:
        q, k, v = (getattr(self, name)(hidden_states).unflatten(-1, (-1, self.head_dim)) for name in PROJECTIONS[:3])
        q, k = (getattr(self, name)(y) if hasattr(self, name) else y for name, y in zip(NORMS, (q, k), strict=True))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        q, k = self.turn(q, k, *position_embeddings)
        cache = next((given.pop(name) for name in ("cache", "past_key_values") if given.get(name) is not None), None)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        k, v = k.index_select(1, self.key_map), v.index_select(1, self.value_map)  # type: ignore[arg-type]
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = own_attention(self, self.kind)(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **given)
        return self.o_proj(out.flatten(2)), weights  # type: ignore[operator]


@torch.no_grad()
def heads_of(model: nn.Module, ids: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Squared distances of the key heads and of the value heads of every layer; ids (N, T): on what they read of these texts."""
    layers = [part for part in model.modules() if all(hasattr(part, name) for name in PROJECTIONS)]
    grams: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, 1).double()
        grams[module] = grams.get(module, torch.zeros(())) + x.T @ x / len(x)

    handles = [layer.k_proj.register_forward_pre_hook(keep) for layer in layers] if ids is not None else []  # type: ignore[union-attr]
    try:
        for row in ids if ids is not None else ():
            model(input_ids=row[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for layer in layers:
        host: Any = layer
        for into, linear in zip(found, (host.k_proj, host.v_proj), strict=True):
            into.append(distances(linear.weight.unflatten(0, (-1, host.head_dim)), grams.get(host.k_proj)))
    return found


def search(
    model: nn.Module,
    key_heads: Sequence[int] | None = None,
    value_heads: Sequence[int] | None = None,
    total: int | None = None,
    ids: Tensor | None = None,
    seed: int = 0,
) -> Plan:
    """Groups of each layer's key heads and value heads. key_heads, value_heads: how many a layer; or total: of both in all layers, shared out so
    that what is merged costs least. ids (N, T): calibration texts."""
    keys, values = heads_of(model, ids)
    if (total is None) == (key_heads is None or value_heads is None):
        raise RegardError("search: expected key_heads and value_heads, a number a layer each, or total")
    counts = shared_out([*keys, *values], total) if total is not None else [*key_heads, *value_heads]  # type: ignore[misc]
    if len(counts) != 2 * len(keys) or any(not 1 <= count <= len(d) for count, d in zip(counts, [*keys, *values], strict=True)):
        raise RegardError(f"key_heads, value_heads {counts}: expected a number from 1 to {len(keys[0])} for each of {len(keys)} layers")
    groups = [annealed(merges(d)[len(d) - count][0], d, seed=seed) for d, count in zip([*keys, *values], counts, strict=True)]
    return {"key": groups[: len(keys)], "value": groups[len(keys) :]}


@register("dha", kind="function")
def to_dha(model: nn.Module, plan: Plan | None = None, **options: Any) -> Conversion:
    """Every attention layer of a transformers decoder as decoupled-head attention, not fused yet: the model gives what it gave.

    plan: groups of heads, of `search`, whose options are taken where it is None (key_heads and value_heads, or total; ids; seed). Then
    `carry_out(conversion, fusing(...), draw)` and `fold_dha(model)`; or fold at once, which is mean pooling of groups.
    """
    plan = search(model, **options) if plan is None else plan
    number = iter(range(len(plan["key"])))

    def make(layer: nn.Module) -> DHAAttention:
        at = next(number)
        return DHAAttention(layer, plan["key"][at], plan["value"][at])

    conversion = convert(model, make)
    first: Any = next(iter(conversion.students.values()))
    first.multipliers = nn.Parameter(torch.zeros(2).to(first.q_proj.weight))
    return conversion


def fold_dha(model: nn.Module) -> nn.Module:
    """Fold every layer, in place: fewer key and value heads are computed and kept."""
    for part in list(model.modules()):
        if isinstance(part, DHAAttention):
            part.fold()
            part._parameters.pop("multipliers", None)
    return model


def fusion_loss(model: nn.Module) -> Tensor:
    """L_f, mean over pairs in groups, groups and layers: 2 at first, 0 where members of every group are one matrix."""
    found = [pairs.mean() for part in model.modules() if isinstance(part, FusedHeads) for pairs in part.penalty()]
    if not found:
        raise RegardError(f"{type(model).__name__}: expected DHA layers with groups of two heads or more, not folded yet")
    return torch.stack(found).mean()


@dataclass(frozen=True)
class FusionLoss:
    """L_LM + l1 (L_f - target) + l2 (L_f - target)^2; the multipliers climb, `climb` times as fast as other parameters fall."""

    target: float
    climb: float = 50.0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        task = next_token_loss(model(input_ids=batch, use_cache=False).logits, batch)
        multipliers = next(p for name, p in model.named_parameters() if name.endswith(".multipliers"))
        gap = fusion_loss(model) - self.target
        terms = torch.stack((gap, gap.square()))
        held = multipliers.detach()
        return task + self.climb * (held * terms).sum() - ((multipliers - held) * terms.detach()).sum()


def fusing(
    steps: int, together: int, parts: int = 3, lr: float = 3e-2, lr_together: float = 5e-3, climb: float = 50.0, **options: Any
) -> list[Stage]:
    """The recipe of fusing: `parts` stages of mixtures alone, whose targets fall evenly from 2 to 0 in `steps` steps, and one of `together` steps of
    all parameters with the target 0. options: of every `Tune`."""
    if parts < 1:
        raise RegardError(f"parts={parts}: expected 1 or more")
    mixtures = [
        Tune(-(-steps // parts), lr, ("*.mix", "*.multipliers"), loss=FusionLoss(2 * (1 - (at + 1) / parts), climb), **options)
        for at in range(parts)
    ]
    return [*mixtures, Tune(together, lr_together, loss=FusionLoss(0.0, climb), **{"schedule": "cosine", **options})]
