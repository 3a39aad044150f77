"""The door: `attend`, `plan`, `step`. One corridor: name -> description -> plan -> executor -> output."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..algebra.mask import Causal, Mask, as_mask, conjuncts
from ..algebra.mechanism import Mechanism, Program, Recurrent, Weighted
from ..algebra.part import Function, Input
from ..algebra.token_mask import Explicit
from ..errors import RegardError
from . import composed, meter, native, order, packed, reference, rows, sdpa, tiled
from . import plan as planner
from . import recurrent as scans
from .plan import Plan
from .problem import Problem, pose, sizes_of
from .recurrent.pose import declared_of
from .reference import Stats

_plans: dict[Any, Plan] = {}
_resolve: list[Callable[[str], Mechanism]] = []
MAX_PLANS = 4096
WITH_STATS = ("native", "tiled")  # executors whose rows come with the statistics that merge needs


def names_resolver(resolve: Callable[[str], Mechanism]) -> None:
    """The catalogue tells the engine how a name becomes a description; the engine never imports the catalogue."""
    _resolve[:] = [resolve]


def resolved(mechanism: str | Mechanism) -> Mechanism:
    if isinstance(mechanism, str):
        return _resolve[0](mechanism)
    if not isinstance(mechanism, Mechanism):
        raise RegardError(f"mechanism is {type(mechanism).__name__}; expected a name (see regard.names()) or a description")
    return mechanism


def planned(q: Tensor, k: Tensor, v: Tensor, mechanism: str | Mechanism, mask: Any, inputs: dict[str, Any], executor: str | None) -> Plan:
    """The plan of a call, remembered by everything it depends on."""
    if torch.compiler.is_compiling():
        shapes = (tuple(q.shape), tuple(k.shape), tuple(v.shape))
        return planned_once(mechanism, mask, shapes, str(q.dtype), str(q.device), q.requires_grad, tuple(inputs), executor)
    return remembered(q, k, v, mechanism, mask, inputs, executor)


def remembered(
    q: Tensor, k: Tensor, v: Tensor, mechanism: str | Mechanism, mask: Any, inputs: dict[str, Any], executor: str | None
) -> Plan:
    try:
        grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        key = (
            mechanism,
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
        found = _plans.get(key)
    except AttributeError:
        sizes_of(q, k, v)  # says which of them is no tensor
        raise
    if found is None:
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        description = resolved(mechanism)
        if mask is None and description.causal_only and not isinstance(description, Weighted):
            mask = Causal()
        found = planner.make(description, as_mask(mask), sizes_of(q, k, v), q.dtype, q.device, grad, frozenset(inputs), executor)
        _plans[key] = found
    return found


def planned_once(
    mechanism: str | Mechanism,
    mask: Any,
    shapes: tuple[tuple[int, ...], ...],
    dtype: str,
    device: str,
    grad: bool,
    inputs: tuple[str, ...],
    executor: str | None,
) -> Plan:
    """The plan as torch.compile sees it: a constant of the shapes it compiles for."""
    q, k, v = (torch.empty(shape, dtype=getattr(torch, dtype[6:]), device=device, requires_grad=grad) for shape in shapes)
    return remembered(q, k, v, mechanism, mask, dict.fromkeys(inputs), executor)


# What torch.compiler.assume_constant_result sets; the decorator itself would load the compiler with `import regard`.
planned_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str | Mechanism = "softmax",
    *,
    mask: Mask | Function | Tensor | None = None,
    scale: float | None = None,
    executor: str | None = None,
    state: Any = None,
    return_state: bool = False,
    **inputs: Any,
) -> Any:
    """Attention of any registered or described mechanism.

    q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv) -> (B, Hq, Lq, Dv). Hq must be a multiple of Hkv (grouped heads); queries
    stand at the end of the keys. mask: a regard mask, a function of (b, h, i, j), a bool tensor broadcastable to (B, Hq, Lq, Lk)
    (True: visible), or None. scale: multiplies dot products; None is D ** -0.5. executor: None lets the planner choose. inputs: the
    tensors the mechanism declares (see `regard show NAME`). A fully masked row gives zeros. Half precision accumulates in float32.
    state, return_state: of a causal call, what a stream of earlier tokens left (from `step`, or a recurrence's first state as tensors), and
    whether (out, the state after the last token) is returned: see `step`.
    Raises RegardError for shapes, dtypes, devices or inputs that do not fit.
    """
    q, k, v = under_autocast(q, k, v)
    if state is not None or return_state:
        return with_state(q, k, v, mechanism, mask, scale, executor, state, return_state, inputs)
    if isinstance(mask, Tensor):
        mask, inputs = explicit(mask, inputs, q)
    chosen = planned(q, k, v, mechanism, mask, inputs, executor)
    if chosen.direct and chosen.form is not None and not meter.counting():
        if inputs:
            unknown(chosen.mechanism, inputs)
        return sdpa.call(q, k, v, chosen.form, scale)
    return execute(chosen, q, k, v, scale, inputs)[0]


def autocasting(x: Any) -> bool:
    return isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type)


def under_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as PyTorch's attention takes them under autocast: in its dtype. Executors then run outside it, and widen what they need."""
    if not autocasting(q):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    cast = [x.to(dtype) if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x for x in (q, k, v)]
    return cast[0], cast[1], cast[2]


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
    from .stream import step

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
        mask, inputs = explicit(mask, inputs, q)
    chosen = planned(q, k, v, mechanism, mask, inputs, executor)
    if executor is None and chosen.executor not in WITH_STATS:
        chosen = planned(q, k, v, mechanism, mask, inputs, "tiled")
    out, stats = execute(chosen, q, k, v, scale, inputs, True)
    if stats is None:
        raise RegardError(f"executor {chosen.executor!r} of {type(chosen.mechanism).__name__} has no row statistics; use executor='tiled'")
    return out, stats


def explicit(mask: Tensor, inputs: dict[str, Any], q: Tensor) -> tuple[Mask, dict[str, Any]]:
    if mask.dtype != torch.bool:
        raise RegardError(f"mask is a {mask.dtype} tensor; expected bool (True: visible). Add biases as a position instead")
    if mask.dim() > 4:
        raise RegardError(f"mask has shape {tuple(mask.shape)}; expected at most 4 dimensions, broadcastable to (B, H, Lq, Lk)")
    return Explicit(), {**inputs, "visible": mask[(None,) * (4 - mask.dim())]}


def unknown(mechanism: Mechanism, inputs: dict[str, Any]) -> None:
    from .problem import check_names

    check_names(inputs, {item.name: item for item in mechanism.declared}, mechanism)


def execute(
    chosen: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: dict[str, Any], stats: bool = False
) -> tuple[Tensor, Stats | None]:
    """Run a plan: (out, row statistics or None). Under torch.compile this is a break between two compiled parts."""
    if autocasting(q):
        with torch.autocast(q.device.type, enabled=False):
            return execute(chosen, q, k, v, scale, inputs, stats)
    return (uncompiled() if "torch._dynamo" in sys.modules else execute_plan)(chosen, q, k, v, scale, inputs, stats)


# What torch.compiler.disable sets; the decorator itself would load the compiler with `import regard`.
execute._torchdynamo_disable = True  # type: ignore[attr-defined]
execute._torchdynamo_disable_msg = "regard's executors run as they are"  # type: ignore[attr-defined]


_uncompiled: list[Callable[..., tuple[Tensor, Stats | None]]] = []


def uncompiled() -> Callable[..., tuple[Tensor, Stats | None]]:
    """`execute_plan`, of which the compiler keeps its hands."""
    if not _uncompiled:
        _uncompiled.append(torch.compiler.disable(execute_plan))
    return _uncompiled[0]


def execute_plan(
    chosen: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: dict[str, Any], stats: bool
) -> tuple[Tensor, Stats | None]:
    mechanism, name = chosen.mechanism, chosen.executor
    if not isinstance(mechanism, (Weighted, Program)) and packed.is_packed(chosen.mask):
        alone = functools.partial(attend, scale=scale, executor=name if isinstance(mechanism, Recurrent) or name == "reference" else None)
        return packed.run(mechanism, inputs_of(mechanism), chosen.mask, q, k, v, inputs, alone), None
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


def weighted(
    chosen: Plan, mechanism: Weighted, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: dict[str, Any], stats: bool
) -> tuple[Tensor, Stats | None]:
    if scale is not None and not mechanism.score.scaled:  # type: ignore[union-attr]
        raise RegardError(f"scale={scale}: {type(mechanism.score).__name__} scores have no scale; expected None")
    if chosen.executor == "reference":
        exact = {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in inputs.items()}
        out, row_stats = reference.run(pose(mechanism, chosen.mask, q.double(), k.double(), v.double(), scale, exact))
        return out.to(v.dtype), row_stats
    if chosen.executor in ("tiled", "native", "rows", "dense"):  # halves are widened before anything is computed with them
        q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    problem = pose(mechanism, chosen.mask, q, k, v, scale, inputs)
    problem.want_count = stats
    if meter.counting():
        meter.add_problem(problem)
    if chosen.executor in ("native", "tiled", "triton"):
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
        from .triton import run

        return run(problem)
    return native.run(problem) if executor == "native" and native.takes(problem) else tiled.run(problem)


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
        mask, inputs = explicit(mask, inputs, q)
    found = planned(q, k, v, mechanism, mask, inputs, executor)
    if not source:
        return found
    if not isinstance(found.mechanism, Weighted):
        raise RegardError("source=True: only weighted mechanisms have a generated kernel")
    from dataclasses import replace

    if found.executor == "native":
        return replace(found, source=native.source_of(found.mechanism, found.mask))
    from .triton import source_of

    return replace(found, source=source_of(found.mechanism, found.mask))
