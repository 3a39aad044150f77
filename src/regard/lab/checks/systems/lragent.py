"""Checks of lragent."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.byhand import half_turned
from regard.lab.checks.shared.decoding import llama, taught
from regard.lab.checks.shared.gaps import gaps
from regard.lab.verification import check
from regard.zoo.systems.lragent import Adapter, MultiLoRACache, applied, layers_of, lora_attention, train_roles


def adapters(model: Any, size: float = 0.5, rank: int = 3, agents: int = 2) -> dict[str, Adapter]:
    """Drawn ones that share a_v."""
    layers = layers_of(model)

    def made(side: str, out: bool) -> list[Tensor]:
        linears = [getattr(m, side) for m in layers]
        return [
            torch.randn(m.out_features if out else rank, rank if out else m.in_features).double() * size / (1 if out else 6)
            for m in linears
        ]

    a_v = made("v_proj", False)
    return {f"agent {n}": Adapter(made("q_proj", False), made("q_proj", True), a_v, made("v_proj", True), 1.5) for n in range(agents)}


def by_hand(model: Any, ids: Tensor, mine: Adapter, owners: list[Adapter] | None = None, finished: bool = False) -> Tensor:
    """Logits (B, L, V): V + LoRA is made. owners: whose hidden states and values each token's cache comes from (one layer; None: mine).
    finished: their b_v as well, as caches that hold finished values have it."""
    x, host = model.model.embed_tokens(ids), model.model
    cos, sin = host.rotary_emb(x, torch.arange(ids.shape[1])[None])
    for at, layer in enumerate(host.layers):
        own, y = layer.self_attn, layer.input_layernorm(x)
        q = y @ own.q_proj.weight.T + mine.scale * y @ mine.a_q[at].T @ mine.b_q[at].T
        k = y @ own.k_proj.weight.T
        v = y @ own.v_proj.weight.T
        rows = [mine] * ids.shape[1] if owners is None or not finished else owners
        v = v + torch.stack([one.scale * y[:, t] @ one.a_v[at].T @ one.b_v[at].T for t, one in enumerate(rows)], 1)
        q, k, v = (t.view(*ids.shape, -1, own.head_dim).transpose(1, 2) for t in (q, k, v))
        q, k = (half_turned(t, cos, sin) for t in (q, k))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        s = (q @ k.mT * own.head_dim**-0.5).masked_fill(~torch.ones(ids.shape[1], ids.shape[1]).tril().bool(), -torch.inf)
        x = x + own.o_proj((s.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(host.norm(x))  # type: ignore[no-any-return]


@check(
    "lragent",
    "grouped heads, all and the last queries: gap to attention over V + C B, and of gradients",
    below=1e-10,
    control="another agent's B",
)
def _() -> tuple[float, float]:
    own, other = [], []
    for n in (29, 5, 1):
        inputs = [
            torch.randn(*shape, dtype=torch.float64, requires_grad=True)
            for shape in ((2, 4, n, 8), (2, 2, 29, 8), (2, 2, 29, 6), (2, 29, 3), (2, 3, 6))
        ]
        q, k, v, c, b = inputs
        full = (v + torch.einsum("blr,hrd->bhld", c, b)).repeat_interleave(2, 1)
        s = (q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)).masked_fill(torch.ones(n, 29).triu(30 - n).bool(), -torch.inf)
        truth = s.softmax(-1) @ full
        own.append(gaps(lora_attention(*inputs), truth, inputs))
        other.append(naive.gap(lora_attention(q, k, v, c, b.flip(0)), truth))
    return max(own), min(other)


@check(
    "lragent",
    "one agent alone, in pieces, all ways of sharing, two layers: gap to the model with its adapter, by hand; B = 0: to the bare model",
    below=1e-9,
    control="another agent's adapter",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = llama(), torch.randint(1, 50, (2, 17))
    both = adapters(model)
    truths = [by_hand(model, ids, one) for one in both.values()]
    own = []
    for share in ("low-rank", "base", "none"):
        cache = MultiLoRACache(model, both, share)
        own.append(naive.gap(torch.cat([cache.extend("agent 0", part) for part in ids.split((9, 7, 1), 1)], 1), truths[0]))
        none = {name: Adapter(x.a_q, [0 * b for b in x.b_q], x.a_v, [0 * b for b in x.b_v], x.scale) for name, x in both.items()}
        cache = MultiLoRACache(model, none, share)
        parts = [cache.extend(f"agent {at % 2}", part) for at, part in enumerate(ids.split(5, 1))]
        own.append(naive.gap(torch.cat(parts, 1), model(ids, use_cache=False).logits))
    return max(own), naive.gap(truths[0], truths[1])


@check(
    "lragent",
    "two agents in turn, one layer: gap of the second's logits to what it would read had it read all itself",
    below=1e-9,
    control="the first agent's finished values read as they are",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = llama(layers=1), torch.randint(1, 50, (2, 30))
    both = adapters(model)
    first, second = both.values()
    truth, own = by_hand(model, ids, second)[:, 20:], []
    for share in ("low-rank", "base", "none"):
        cache = MultiLoRACache(model, both, share)
        cache.extend("agent 0", ids[:, :20])
        own.append(naive.gap(cache.extend("agent 1", ids[:, 20:]), truth))
    reused = by_hand(model, ids, second, [first] * 20 + [second] * 10, finished=True)[:, 20:]
    return max(own), naive.gap(reused, truth)


@check(
    "lragent",
    "bytes of three agents over those of the formulas less 1, and tokens projected for the second agent's 200 shared ones",
    below=0.0,
    control="a cache each",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = llama(), torch.randint(1, 50, (1, 212))
    three, worst, projected = adapters(model, agents=3), [], []
    known = (203, 204, 205)  # tokens that each agent has read in the end
    numbers = {"low-rank": 205 * (32 + 3), "base": 205 * 32 + 3 * sum(known), "none": 32 * sum(known)}
    for share in numbers:
        cache = MultiLoRACache(model, three, share)
        cache.extend("agent 0", ids[:, :200])
        for at, agent in enumerate(("agent 1", "agent 2", "agent 0", "agent 1", "agent 2")):
            before = cache.projected
            cache.extend(agent, ids[:, 200 + at : 201 + at])
            projected += [cache.projected - before - 1] if at == 0 else []
        worst.append(abs(cache.bytes / (2 * 8 * numbers[share]) - 1))
    return max(worst) + projected[0] + projected[1], float(projected[2])


@check(
    "lragent",
    "two layers, adapters of size 0.1 to 0.001: largest gap of 1 to the slope of log error over log size",
    below=0.3,
    control="with the error's square",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = llama(), torch.randint(1, 50, (2, 30))
    errors = []
    for size in (0.1, 0.01, 0.001):
        torch.manual_seed(3)
        both = adapters(model, 1.0)
        for one in both.values():
            one.b_q, one.b_v = ([size * x for x in side] for side in (one.b_q, one.b_v))
        found = []
        for share in ("low-rank", "none"):
            cache = MultiLoRACache(model, both, share)
            cache.extend("agent 0", ids[:, :20])
            found.append(cache.extend("agent 1", ids[:, 20:]))
        errors.append(naive.gap(*found))
    slopes = [math.log10(a / b) for a, b in itertools.pairwise(errors)]
    return max(abs(slope - 1) for slope in slopes), min(abs(2 * slope - 1) for slope in slopes)


def counting(move: int) -> Any:
    """A role that counts on by `move`: pairs of ids from 5 on, modulo 12."""

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        start = torch.randint(0, 12, (24, 1), generator=generator)
        ids = 5 + (start + move * torch.arange(2)) % 12
        return ids, torch.ones_like(ids, dtype=torch.bool)

    return draw


@functools.cache
def roles() -> tuple[float, float]:
    """Loss of a role's texts under its own adapter and under the other's; the model has learned both roles' texts, which it cannot tell apart."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    both = {"one": counting(1), "two": counting(2)}
    model = llama(vocab=20).float()
    for p in model.parameters():
        p.data.mul_(0.5 if p.dim() > 1 else 1)
    taught(model, lambda: torch.cat([draw(generator)[0] for draw in both.values()]), 120, 1e-2)
    found = train_roles(model, both, rank=4, steps=60, lr=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(found["one"].a_v, found["two"].a_v, strict=True))
    ids, losses = both["one"](generator)[0], []
    for adapter in found.values():
        with torch.no_grad(), applied(layers_of(model), adapter):
            logits = model(input_ids=ids, use_cache=False).logits[:, 0]
        losses.append(float(torch.nn.functional.cross_entropy(logits, ids[:, 1])))
    return losses[0], losses[1]


@check(
    "lragent",
    "two roles trained with one A on a model that cannot tell them apart: loss of a role's texts",
    below=0.5,
    control="the other role's B",
)
def _() -> tuple[float, float]:
    return roles()
