"""The door: `attend`, `plan`, `step`. One corridor: name -> description -> plan -> executor -> output."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..algebra.mask import Mask, as_mask, conjuncts
from ..algebra.mechanism import Mechanism, Program, Recurrent, Weighted
from ..algebra.part import Function, Input
from ..algebra.position_mask import Causal
from ..algebra.rows import RowWise
from ..algebra.snapshot import fixed
from ..errors import RegardError
from . import alone, composed, meter, native, order, packed, reference, rows, sdpa, table, tiled
from . import plan as planner
from . import recurrent as scans
from .autocast import autocasting, under_autocast
from .given import given_mask
from .inner import opened
from .names import resolved
from .plan import Plan
from .problem import Problem, check_names, pose, sizes_of
from .recurrent.pose import declared_of
from .reference import Stats
from .settle import settle
from .stream import step
from .weights import dropped

_plans: dict[Any, Plan] = {}
MAX_PLANS = 4096
WITH_STATS = ("native", "tiled")  # executors whose rows come with the statistics that merge needs


def planned(q: Tensor, k: Tensor, v: Tensor, mechanism: str | Mechanism, mask: Any, inputs: dict[str, Any], executor: str | None) -> Plan:
    """The plan of a call, remembered by everything it depends on."""
    description = settle(resolved(mechanism))
    rule = getattr(description, "normalizer", None)
    if getattr(rule, "usual", None) is not None and not any(item.name in inputs for item in rule.inputs):  # type: ignore[union-attr]
        description = usual(description)
    mask = None if mask is None else settle(as_mask(mask))
    lasting = fixed(description) and (mask is None or fixed(mask))
    try:
        grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        key = (
            description,
            mask,
            q.shape,
            k.shape,
            v.shape,
            q.dtype,
            k.dtype,
            v.dtype,
            q.device,
            k.device,
            v.device,
            grad,
            executor,
            tuple(inputs),
        )
        found = _plans.get(key) if lasting else None
    except AttributeError:
        sizes_of(q, k, v)  # says which of them is no tensor
        raise
    if found is None:
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        within = Causal() if mask is None and description.causal_only and not isinstance(description, Weighted) else as_mask(mask)
        found = planner.make(description, within, sizes_of(q, k, v), q.dtype, q.device, grad, frozenset(inputs), executor)
        if lasting:
            _plans[key] = found
    return found


@functools.lru_cache(256)
def usual(description: Weighted) -> Weighted:
    """A mechanism whose normalizer's inputs keep their defaults."""
    return replace(description, normalizer=description.normalizer.usual)  # type: ignore[union-attr, arg-type, attr-defined]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str | Mechanism = "softmax",
    *,
    mask: Mask | Function | Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    executor: str | None = None,
    state: Any = None,
    return_state: bool = False,
    **inputs: Any,
) -> Any:
    """Attention of any registered or described mechanism.

    q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv) -> (B, Hq, Lq, Dv). Hq must be a multiple of Hkv (grouped heads); queries
    stand at the end of the keys; without heads, q (B, Lq, D), k (B, Lk, D), v (B, Lk, Dv) -> (B, Lq, Dv). mask: a regard mask, a
    function of (b, h, i, j), a tensor broadcastable to (B, Hq, Lq, Lk), bool (True: visible) or floating (added to the scores of a
    weighted mechanism; -inf hides), or None. scale: multiplies dot products; None is D ** -0.5. dropout_p: the share of weights that is
    dropped, the others divided by 1 - dropout_p; but for softmax this needs the (Lq, Lk) matrix of weights, which some mechanisms have
    not. executor: None lets the planner choose. inputs: the tensors the mechanism declares (see `regard show NAME`). A fully masked row gives zeros. Half precision accumulates in float32.
    state, return_state: of a causal call, what a stream of earlier tokens left (from `step`, or a recurrence's first state as tensors), and
    whether (out, the state after the last token) is returned: see `step`.
    Raises RegardError for shapes, dtypes, devices or inputs that do not fit.
    """
    q, k, v = under_autocast(q, k, v)
    if dropout_p:
        if executor is not None or state is not None or return_state:
            raise RegardError(
                f"dropout_p={dropout_p} with executor, state or return_state: dropout has its own way; expected these left out"
            )
        return dropped(q, k, v, mechanism, dropout_p, mask=mask, scale=scale, **inputs)[0]
    if state is not None or return_state:
        return with_state(q, k, v, mechanism, mask, scale, executor, state, return_state, inputs)
    if torch.compiler.is_compiling():
        return compiled(q, k, v, mechanism, mask, scale, executor, inputs)
    return attend_now(q, k, v, mechanism, mask, scale, executor, inputs)


def attend_now(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str | Mechanism,
    mask: Mask | Function | Tensor | None,
    scale: float | None,
    executor: str | None,
    inputs: dict[str, Any],
) -> Tensor:
    """`attend` of one whole call, outside the compiler."""
    if isinstance(q, Tensor) and q.dim() == 3:
        return single(q, k, v, mechanism, mask, scale=scale, executor=executor, **inputs)
    if isinstance(mask, Tensor):
        if mask.dtype == torch.bool and executor is None and not inputs and plain(mechanism) and not meter.counting():
            out = sdpa.table(q, k, v, mask, scale)
            if out is not None:
                return out
        mechanism, mask, inputs = given_mask(mechanism, mask, inputs)
    chosen = planned(q, k, v, mechanism, mask, inputs, executor)
    if chosen.direct and chosen.form is not None and not meter.counting():
        if inputs:
            check_names(inputs, chosen.inputs, chosen.mechanism)
        if chosen.form == "given":
            return sdpa.given(q, k, v, chosen.whole_mask, chosen.mask_inputs, inputs, chosen.sizes, scale)
        return sdpa.call(q, k, v, chosen.form, scale)
    return execute(chosen, q, k, v, scale, inputs)[0]


def with_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str | Mechanism,
    mask: Any,
    scale: float | None,
    executor: str | None,
    state: Any,
    return_state: bool,
    inputs: dict[str, Any],
) -> Any:
    """A call that goes on from a state, or gives one: that of a stream."""
    if executor is not None:
        raise RegardError(f"executor={executor!r} with state: a call with a state runs as a stream does; expected None")
    causal = isinstance(mask, Mask) and any(isinstance(part, Causal) for part in conjuncts(mask))
    if not causal and not (mask is None and resolved(mechanism).causal_only):
        raise RegardError(f"mask={mask!r} with state: what earlier tokens leave is read by later ones alone; expected mask=Causal()")
    out, new = step(q, k, v, mechanism, state, mask=mask, scale=scale, **inputs)
    return (out, new) if return_state else out


def attend_with_stats(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str | Mechanism = "softmax",
    *,
    mask: Mask | Function | Tensor | None = None,
    scale: float | None = None,
    executor: str | None = None,
    **inputs: Any,
) -> tuple[Tensor, Stats]:
    """`attend` of a weighted mechanism, with each row's (shift, total, count), which `merge` joins over split keys."""
    q, k, v = under_autocast(q, k, v)
    if isinstance(mask, Tensor):
        mechanism, mask, inputs = given_mask(mechanism, mask, inputs)
    description = resolved(mechanism)
    rule = getattr(description, "normalizer", None)
    if rule is None or not rule.row_local or isinstance(rule, RowWise):
        name = mechanism if isinstance(mechanism, str) else type(description).__name__
        raise RegardError(f"{name} has no row statistics; expected a mechanism whose weights are those of scores, row by row")
    chosen = planned(q, k, v, mechanism, mask, inputs, executor)
    if executor is None and chosen.executor not in WITH_STATS:
        chosen = planned(q, k, v, mechanism, mask, inputs, "tiled")
    out, stats = execute(chosen, q, k, v, scale, inputs, True)
    if stats is None:
        raise RegardError(f"executor={chosen.executor!r} gives no row statistics; expected one of {', '.join(WITH_STATS)}, or None")
    return out, stats


def single(q: Tensor, k: Tensor, v: Tensor, mechanism: str | Mechanism, mask: Any, **options: Any) -> Tensor:
    """`attend` without a dimension of heads."""
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 3:
            came = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise RegardError(f"{name} is {came} but q has shape {tuple(q.shape)}; expected (batch, length, channels) like q")
    mask = mask.unsqueeze(-3) if isinstance(mask, Tensor) and mask.dim() == 3 else mask
    return attend(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), mechanism, mask=mask, **options).squeeze(1)


def plain(mechanism: str | Mechanism) -> bool:
    """Whether a mechanism is softmax over dot products and nothing else."""
    return mechanism == "softmax" if isinstance(mechanism, str) else getattr(mechanism, "plain", False)


_eager: list[Callable[..., Any]] = []


def compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str | Mechanism,
    mask: Any,
    scale: float | None,
    executor: str | None,
    inputs: dict[str, Any],
) -> Tensor:
    """`attend` inside torch.compile: plain softmax is traced; everything else is a break between two compiled parts."""
    if plain(mechanism) and executor is None and not inputs and q.dim() == 4:
        how = sdpa.traced(q, k, v, mask)
        if how is not None:
            return sdpa.call(*how[:3], how[3], scale, how[4])
    if not _eager:
        _eager.append(torch.compiler.disable(attend_now))  # here, since loading the compiler takes longer than `import regard` may
    return _eager[0](q, k, v, mechanism, mask, scale, executor, inputs)  # type: ignore[no-any-return]


def execute(
    chosen: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: dict[str, Any], stats: bool = False
) -> tuple[Tensor, Stats | None]:
    """Run a plan: (out, row statistics or None)."""
    if autocasting(q):
        with torch.autocast(q.device.type, enabled=False):
            return execute(chosen, q, k, v, scale, inputs, stats)
    mechanism, name = chosen.mechanism, chosen.executor
    if chosen.sizes.empty:
        return nothing(chosen, q, k, v, inputs)
    if alone.counts_places(mechanism) and alone.may_divide(chosen.mask):
        again = functools.partial(once_more, scale=scale, executor=name, stats=stats)
        divided = alone.run(mechanism, inputs_of(mechanism), chosen.mask, q, k, v, inputs, again)
        if divided is not None:
            return divided
    if not isinstance(mechanism, (Weighted, Program)) and packed.is_packed(chosen.mask):
        each = functools.partial(attend, scale=scale, executor=name if isinstance(mechanism, Recurrent) or name == "reference" else None)
        return packed.run(mechanism, inputs_of(mechanism), chosen.mask, q, k, v, inputs, each), None
    if isinstance(mechanism, Recurrent):
        exact = torch.float64 if name == "reference" else None
        scan = scans.pose(mechanism, chosen.mask, q, k, v, scale, inputs, exact)
        out, _ = scans.run(scan, "parallel" if name == "reference" else name)
        return out[..., -q.shape[-2] :, :].to(v.dtype), None
    if isinstance(mechanism, Weighted):
        return weighted(chosen, mechanism, q, k, v, scale, inputs, stats)
    given = v.dtype
    inner: Any = attend
    if name == "reference":
        q, k, v = q.double(), k.double(), v.double()
        inputs = {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in inputs.items()}

        def inner(q: Tensor, k: Tensor, v: Tensor, m: Mechanism, **rest: Any) -> Tensor:
            return attend(q, k, v, m, executor="reference", **rest)

    return composed.RUN[type(mechanism)](mechanism, q, k, v, chosen.mask, scale, inputs, inner).to(given), None


def nothing(chosen: Plan, q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Stats]:
    """No sequences, no queries, or no keys: rows of zeros, if there are rows, with zero gradients."""
    check_names(inputs, chosen.inputs, chosen.mechanism)
    for name, spec in chosen.inputs.items():
        if spec.default is None and inputs.get(name) is None:
            raise RegardError(f"input {name!r} is missing; expected a {spec.dtype} tensor of shape ({' '.join(spec.shape) or 'scalar'})")
    rows = q[..., :0].sum(-1, keepdim=True) + k[..., :0].sum() + v[..., :0].sum()
    return rows.expand(*q.shape[:-1], v.shape[-1]).to(v.dtype), Stats(rows.detach(), rows.detach(), rows.detach())


def once_more(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: Mechanism,
    *,
    mask: Mask,
    scale: float | None,
    executor: str,
    stats: bool,
    **inputs: Any,
) -> tuple[Tensor, Stats | None]:
    """A sequence of a call that runs in `executor`; those made for whole calls are chosen anew, by the sequence's own sizes."""
    wanted = executor if stats or executor in ("reference", "tiled", "rows", "dense") else None
    return execute(planned(q, k, v, mechanism, mask, inputs, wanted), q, k, v, scale, inputs, stats)


def weighted(
    chosen: Plan, mechanism: Weighted, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: dict[str, Any], stats: bool
) -> tuple[Tensor, Stats | None]:
    if scale is not None and not mechanism.score.scaled:  # type: ignore[union-attr]
        raise RegardError(f"scale={scale}: {type(mechanism.score).__name__} scores have no scale; expected None")
    if chosen.executor == "reference":
        exact = {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in inputs.items()}
        out, row_stats = reference.run(pose(mechanism, chosen.mask, q.double(), k.double(), v.double(), scale, exact))
        return out.to(v.dtype), row_stats
    if chosen.executor in ("table", "tiled", "native", "rows", "dense"):  # halves are widened before anything is computed with them
        q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    problem = pose(mechanism, chosen.mask, q, k, v, scale, inputs)
    problem.want_count = stats
    if meter.counting():
        meter.add_problem(problem)
    if by_table(chosen.executor, problem):
        return table.run(problem)
    if chosen.executor in ("native", "table", "tiled", "triton"):
        return order.run(problem, functools.partial(in_blocks, chosen.executor))
    if chosen.executor == "sdpa":
        return sdpa.run(problem), None
    if chosen.executor == "rows":
        return rows.run(problem)
    if chosen.executor == "dense":
        return reference.run(problem, torch.promote_types(q.dtype, torch.float32))
    from . import flex

    return flex.run(problem), None


def in_blocks(executor: str, problem: Problem) -> tuple[Tensor, Stats]:
    """A weighted problem by an executor that skips blocks without visible pairs."""
    if executor == "triton":
        from . import triton

        return triton.run(problem) if triton.takes(problem) else tiled.run(problem)
    return native.run(problem) if executor == "native" and native.takes(problem) else tiled.run(problem)


def by_table(executor: str, problem: Problem) -> bool:
    """Whether a selection is looked up pair by pair: what the planner chose, or blocks that the chosen kernel cannot follow."""
    if problem.selection is None:  # a selector may leave everything to be read
        return False
    if executor != "native" or problem.want_count or native.takes(problem):
        return executor == "table"
    return not table.refusal(problem.mechanism, problem.sizes, problem.q.device)


def inputs_of(mechanism: Mechanism) -> dict[str, Input]:
    return declared_of(mechanism) if isinstance(mechanism, Recurrent) else {item.name: item for item in mechanism.declared}


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str | Mechanism = "softmax",
    *,
    mask: Mask | Function | Tensor | None = None,
    scale: float | None = None,
    executor: str | None = None,
    source: bool = False,
    **inputs: Any,
) -> Plan:
    """What `attend` with these arguments would run, why, and what it costs: EXPLAIN for attention. Nothing is computed.

    source: also write out the kernel generated for a weighted mechanism: C where `native` runs, Triton elsewhere.
    """
    if isinstance(mask, Tensor):
        mechanism, mask, inputs = given_mask(mechanism, mask, inputs)
    found = planned(q, k, v, mechanism, mask, inputs, executor)
    check_names(inputs, found.inputs, found.mechanism)
    if not source:
        return found
    if not isinstance(found.mechanism, Weighted):
        raise RegardError("source=True: only weighted mechanisms have a generated kernel")
    if found.executor == "native":
        return replace(found, source=native.source_of(found.mechanism, found.mask))
    from .triton import source_of

    return replace(found, source=source_of(found.mechanism, found.mask))


opened(attend, attend_with_stats)
