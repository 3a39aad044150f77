"""Mechanisms made of other mechanisms: relayed, Nystrom, clustered, hybrid. Each runs as a few calls of the shapes inside it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra.local import LocalLinear
from ..algebra.mask import Full, Mask
from ..algebra.mechanism import Clustered, Hybrid, Mechanism, Nystrom, Program, Relayed, Weighted
from ..algebra.part import call
from ..algebra.position_mask import Causal
from ..algebra.score import SquaredDistance
from ..algebra.states import LogLinear, Slots
from ..algebra.token_mask import Explicit
from ..errors import RegardError
from . import local
from .inner import attend_with_stats, is_door
from .merge import merge
from .problem import check_names, fill_inputs, sizes_of
from .recurrent import levels, slots
from .reference import repeat_heads

Attend = Callable[..., Tensor]


def pooled(x: Tensor, count: int) -> Tensor:
    """Mean-pool the length of (B, H, L, D) to at most `count` tokens."""
    count = min(count, x.shape[-2])
    return F.adaptive_avg_pool1d(x.flatten(0, 1).transpose(1, 2), count).transpose(1, 2).unflatten(0, x.shape[:2])


def whole(mask: Mask, mechanism: Mechanism) -> None:
    if not isinstance(mask, Full):
        raise RegardError(f"mask={mask!r}: {type(mechanism).__name__} mixes all keys before any query reads them; expected no mask")


def relayed(
    mechanism: Relayed, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None, given: Mapping[str, Any], attend: Attend
) -> Tensor:
    whole(mask, mechanism)
    sizes_of(q, k, v)
    declared = {item.name: item for item in mechanism.declared}
    check_names(given, declared, mechanism)
    agents = given.get("agents")
    agents = pooled(q, mechanism.count) if agents is None else agents
    inner = {side: {name.removeprefix(side): x for name, x in given.items() if name.startswith(side)} for side in ("gather_", "spread_")}
    relay = attend(agents, k, v, mechanism.gather, scale=scale, **inner["gather_"])
    return attend(q, agents, relay, mechanism.spread, scale=scale, **inner["spread_"])


class NewtonInverse(torch.autograd.Function):
    """(A + ridge I)^-1 by Newton-Raphson (iterations None: directly); backward is -Y^T G Y^T, without walking back through the iterations."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, ridge: float, start: float, iterations: int | None) -> Tensor:
        system = a + ridge * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        y = torch.linalg.inv(system) if iterations is None else newton_steps(system, start / row_sums(a).square(), iterations)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (y,) = ctx.saved_tensors
        turned = y.transpose(-1, -2)
        return -turned @ grads[0] @ turned, None, None, None


def row_sums(a: Tensor) -> Tensor:
    """The largest row sum of each matrix, (..., 1, 1)."""
    return a.abs().sum(-1).amax(-1)[..., None, None]


def newton_steps(system: Tensor, start: Tensor, iterations: int) -> Tensor:
    y = start * system
    for _ in range(iterations):
        y = 2 * y - y @ system @ y
    return y


def batchwise_inverse(a: Tensor, iterations: int, start: float = 2.0, halvings: int = 10, bound: float = 1.01) -> Tensor:
    """A^-1 as SOFT++ was released: one factor for the whole batch, halved until no column of |I - factor A A| sums to more than `bound`."""
    with torch.no_grad():
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        factor = start / row_sums(a).amax().square()
        for _ in range(halvings):
            if float((eye - factor * a @ a).abs().sum(-2).amax()) <= bound:
                break
            factor = factor / 2
    return newton_steps(a, factor, iterations)


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    return torch.exp(-SquaredDistance.apply(x, y) / 2)


def nystrom(
    mechanism: Nystrom, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None, given: Mapping[str, Any], attend: Attend
) -> Tensor:
    whole(mask, mechanism)
    sizes = sizes_of(q, k, v)
    declared = {item.name: item for item in mechanism.declared}
    check_names(given, declared, mechanism)
    dtype, wide = v.dtype, torch.promote_types(q.dtype, torch.float32)
    temperature = (sizes.head_dim**-0.5 if scale is None else scale) ** 0.5
    q, k = (x.to(wide) * temperature for x in (q, repeat_heads(k, sizes.heads)))
    v = repeat_heads(v, sizes.heads).to(wide)
    marks = given.get("landmarks")
    marks = pooled(q, mechanism.count) if marks is None else marks.to(wide) * temperature
    middle = gaussian(marks, marks)
    start = 2.0 if mechanism.symmetric else 1.8
    if mechanism.mode == "released":
        inverse = batchwise_inverse(middle, mechanism.iterations)
    else:
        inverse = NewtonInverse.apply(middle, mechanism.ridge, start, None if mechanism.mode == "exact" else mechanism.iterations)
    if mechanism.symmetric:
        side = middle.sum(-1).rsqrt()
        inverse = side[..., :, None] * inverse * side[..., None, :]
    return (gaussian(q, marks) @ (inverse @ (gaussian(marks, k) @ v))).to(dtype)


def formed(x: Tensor, form: str, eps: float = 1e-5) -> Tensor:
    """x by LayerNorm without affine ("layer"), of length one ("unit"), both ("layer+unit"), or as it is ("")."""
    x = F.layer_norm(x, x.shape[-1:], eps=eps) if form.startswith("layer") else x
    return F.normalize(x, dim=-1) if form.endswith("unit") else x


def members(x: Tensor, centroids: Tensor, count: int) -> Tensor:
    """The `count` tokens nearest to each centroid, in order of position: (B, H, c, count)."""
    nearness = x @ centroids.transpose(-1, -2)
    return nearness.transpose(-1, -2).topk(min(count, x.shape[-2]), -1).indices.sort(-1).values


def take(x: Tensor, index: Tensor) -> Tensor:
    """x (B, H, L, D) at index (B, H, c, w) -> (B, H * c, w, D)."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).unflatten(2, index.shape[2:]).flatten(1, 2)


def clustered(
    mechanism: Clustered, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None, given: Mapping[str, Any], attend: Attend
) -> Tensor:
    if not isinstance(mask, (Full, Causal)):
        raise RegardError(f"mask={mask!r}: clustered attention runs under Causal() or no mask")
    sizes = sizes_of(q, k, v)
    declared = {item.name: item for item in mechanism.declared}
    check_names(given, declared, mechanism)
    inputs = fill_inputs(declared, given, sizes, q)
    centroids = inputs["centroids"].to(q.dtype)
    centroids = F.normalize(centroids, dim=-1) if mechanism.route.endswith("unit") else centroids
    k, v = repeat_heads(k, sizes.heads), repeat_heads(v, sizes.heads)
    if mechanism.shared and sizes.q_len != sizes.k_len:
        raise RegardError(f"{sizes.q_len} queries and {sizes.k_len} keys: keys that are the queries (shared=True) need as many of both")
    k = q if mechanism.shared else k
    count = mechanism.members or -(-sizes.k_len // mechanism.clusters)
    q_at = members(formed(q.detach(), mechanism.route, mechanism.norm_eps), centroids, count)
    k_at = q_at if mechanism.shared else members(formed(k.detach(), mechanism.route, mechanism.norm_eps), centroids, count)
    q, k = formed(q, mechanism.queries, mechanism.norm_eps), formed(k, mechanism.keys, mechanism.norm_eps)
    q_place, k_place = q_at + sizes.k_len - sizes.q_len, k_at
    seen = torch.ones(*q_at.shape, k_at.shape[-1], dtype=torch.bool, device=q.device)
    if isinstance(mask, Causal):
        seen = q_place[..., :, None] >= k_place[..., None, :]
    recalls = "memory_k" in inputs or "memory_v" in inputs
    if mechanism.hide_self:  # a token sees itself only where it would see nothing else, a memory included
        own = q_place[..., :, None] == k_place[..., None, :]
        others = seen & ~own
        seen = others if recalls else others | (own & ~others.any(-1, keepdim=True))
    scale = (sizes.head_dim**-0.5 if mechanism.scaled else 1.0) if scale is None else scale
    keys, values, seen = take(k, k_at), take(v, k_at), seen.flatten(1, 2)
    if recalls:
        keys, values, seen = remembered(inputs, keys, values, seen)
    out = attend(take(q, q_at), keys, values, mechanism.inner, mask=Explicit(), scale=scale, visible=seen)
    out = out.unflatten(1, (sizes.heads, -1)).flatten(2, 3)
    place = q_at.flatten(2)[..., None]
    total = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=out.dtype, device=q.device).scatter_add(2, place.expand_as(out), out)
    times = torch.zeros(*q.shape[:-1], 1, dtype=out.dtype, device=q.device).scatter_add(2, place, torch.ones_like(out[..., :1]))
    return total / (times + mechanism.count_eps).clamp_min(torch.finfo(total.dtype).tiny)


def remembered(inputs: Mapping[str, Tensor], keys: Tensor, values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A cluster's keys, values and visible pairs (B, H * c, ...) with its memory before them."""
    memory = [inputs.get(name) for name in ("memory_k", "memory_v")]
    if memory[0] is None or memory[1] is None or memory[0].shape[:3] != memory[1].shape[:3]:
        came = [None if x is None else tuple(x.shape) for x in memory]
        raise RegardError(
            f"inputs 'memory_k' and 'memory_v' have shapes {came[0]} and {came[1]}; expected both, (H, c, m, D) and (H, c, m, Dv)"
        )
    if memory[0].shape[0] * memory[0].shape[1] != keys.shape[1]:
        raise RegardError(f"input 'memory_k' has shape {tuple(memory[0].shape)}; expected {keys.shape[1]} heads times clusters")
    old_k, old_v = (x.flatten(0, 1).to(keys.dtype).expand(keys.shape[0], -1, -1, -1) for x in memory if x is not None)
    return torch.cat((old_k, keys), 2), torch.cat((old_v, values), 2), F.pad(seen, (old_k.shape[2], 0), value=True)


def hybrid(
    mechanism: Hybrid, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None, given: Mapping[str, Any], attend: Attend
) -> Tensor:
    declared = {item.name: item for item in mechanism.declared}
    of_mask = [item for part in mask.parts() for item in getattr(part, "inputs", ())]
    check_names(given, {**declared, **{i.name: i for i in (*of_mask, *[i for m in mechanism.members for i in inputs_of(m)])}}, mechanism)

    def part(member: Mechanism, q: Tensor, k: Tensor, v: Tensor, heads: slice | None = None) -> Tensor:
        mine: dict[str, Any] = {}
        for item in (*inputs_of(member), *of_mask):
            if item.name in given:
                x = given[item.name]
                at = item.shape.find("h")
                mine[item.name] = x.narrow(at, heads.start, heads.stop - heads.start) if heads and at >= 0 and x.shape[at] == q_heads else x
        return attend(q, k, v, member, mask=mask, scale=scale, **mine)

    q_heads = q.shape[1]
    if mechanism.how == "head":
        if sum(mechanism.shares) != q_heads:
            raise RegardError(f"shares {mechanism.shares} of heads sum to {sum(mechanism.shares)}; q has {q_heads} heads")
        k, v = repeat_heads(k, q_heads), repeat_heads(v, q_heads)
        outs, start = [], 0
        for member, share in zip(mechanism.members, mechanism.shares, strict=True):
            at = slice(start, start + int(share))
            outs.append(part(member, q[:, at], k[:, at], v[:, at], at))
            start += int(share)
        return torch.cat(outs, 1)
    outs = [part(member, q, k, v) for member in mechanism.members]
    if mechanism.how in ("sum", "blend", "channels"):
        return blended(mechanism, outs, given)
    gate = given.get("gate")
    if gate is None or gate.shape[-1] != len(outs):
        raise RegardError(f"input 'gate': expected (B, H, Lq, {len(outs)}), got {None if gate is None else tuple(gate.shape)}")
    return (torch.stack(outs, -1) * gate[..., None, :].to(outs[0].dtype)).sum(-1)


def blended(mechanism: Hybrid, outs: Sequence[Tensor], given: Mapping[str, Any]) -> Tensor:
    """The members' sum, each times its part of `blend` where there is one."""
    if mechanism.how == "sum":
        return torch.stack(tuple(outs)).sum(0)
    blend = given.get("blend")
    if mechanism.how == "channels":
        wanted = (len(outs), outs[0].shape[1], outs[0].shape[-1])
        if blend is None:
            blend = outs[0].new_tensor(mechanism.shares)[:, None, None].expand(wanted)
        if blend.shape != wanted:
            raise RegardError(f"input 'blend' has shape {tuple(blend.shape)}; expected {wanted}: members, heads, channels")
        return (torch.stack(tuple(outs)) * blend[:, None, :, None].to(outs[0])).sum(0)
    factors = torch.tensor(mechanism.shares, dtype=torch.float64) if blend is None else blend
    if factors.shape != (len(outs),):
        raise RegardError(f"input 'blend' has shape {tuple(factors.shape)}; expected ({len(outs)},), one number a member")
    return sum((o * factor.to(o) for o, factor in zip(outs, factors, strict=True)), torch.zeros_like(outs[0]))


def inputs_of(mechanism: Mechanism) -> Any:
    from ..algebra.mechanism import Recurrent
    from .recurrent.pose import declared_of

    if isinstance(mechanism, LogLinear):
        return (*declared_of(mechanism.inner).values(), *mechanism.inputs)
    return declared_of(mechanism).values() if isinstance(mechanism, Recurrent) else mechanism.declared


@dataclass(frozen=True)
class Call:
    """What a program's function is called with: the mask, the scale (None: D^-1/2), and how to run what it is made of."""

    mask: Mask
    scale: float | None
    attend: Attend
    with_stats: Callable[..., Any]

    def logit_scale(self, q: Tensor) -> float:
        return float(q.shape[-1] ** -0.5 if self.scale is None else self.scale)

    def merge(self, parts: Sequence[tuple[Tensor, Any]]) -> Tensor:
        """One softmax over disjoint sets of keys, from `(out, stats)` of each."""
        return merge(Weighted(), parts)[0]


def program(
    mechanism: Program, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None, given: Mapping[str, Any], attend: Attend
) -> Tensor:
    mask = Causal() if mechanism.under == "causal" and isinstance(mask, Full) else mask
    known = {"none": (Full,), "causal": (Causal,), "any": (Full, Causal)}[mechanism.under]
    if not isinstance(mask, known):
        raise RegardError(f"mask={mask!r}: this mechanism runs under {' or '.join(f'{kind.__name__}()' for kind in known)}")
    sizes = sizes_of(q, k, v)
    declared = {item.name: item for item in mechanism.declared}
    check_names(given, declared, mechanism)
    dtype, wide = v.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q, k, v))
    # The reference runs its parts in the reference too.
    exact = None if is_door(attend) else "reference"
    made = Call(mask, scale, attend, functools.partial(attend_with_stats, executor=exact))
    return call(mechanism.function, q, k, v, made, env={**dict.fromkeys(declared), **fill_inputs(declared, given, sizes, q)}).to(dtype)  # type: ignore[no-any-return]


RUN: dict[type[Mechanism], Callable[..., Tensor]] = {
    Relayed: relayed,
    Nystrom: nystrom,
    Clustered: clustered,
    Hybrid: hybrid,
    Slots: slots.slots,
    LogLinear: levels.run,
    LocalLinear: local.run,
    Program: program,
}
# How a stream of these goes on: (mechanism, q, k, v, state, scale, inputs) -> (out, state).
STEP: dict[type[Mechanism], Callable[..., tuple[Tensor, Any]]] = {Slots: slots.step, LogLinear: levels.step}
