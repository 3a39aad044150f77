"""Descriptions as they are at a call: functions that can change become snapshots, or the formulas they are at this moment."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.mask import Where
from ..algebra.normalizer import RowLocal
from ..algebra.part import Function, Part, asks, show
from ..algebra.position import Modified
from ..algebra.rows import RowWise
from ..algebra.score import Pairwise
from ..algebra.snapshot import R, Snapshot, as_now, fixed
from ..errors import RegardError
from .symbolic import OPS, Expr, Untraceable, topological, trace, var

# Fields of elementwise functions, and how many arguments come by place.
ELEMENTWISE: Mapping[type[Part], Mapping[str, Sequence[str]]] = {
    Where: {"function": ("b", "h", "i", "j")},
    Modified: {"function": ("s",)},
    RowLocal: {"weight": ("s",), "mass": ("s",), "divide": ("total",), "floor": ()},
}
DIFFERENTIATED: Mapping[type[Part], Sequence[str]] = {
    Modified: ("function",),
    RowLocal: ("weight", "mass"),
    Pairwise: ("function",),
    RowWise: ("function",),
}


def settle(part: R) -> R:
    """The description with everything its functions captured written down, as far as that can be done: see `snapshot.fixed`."""
    return part if fixed(part) else as_now(part, formula)


class Formula:
    """An expression as a function of tensors, with the signature of the function it was traced from."""

    def __init__(self, expression: Expr, names: Sequence[str]):
        self.expression, self.names = expression, tuple(names)
        self.__signature__ = inspect.Signature([inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        values: dict[int, Any] = {}
        for e in topological([self.expression]):
            if e.op == "var":
                values[id(e)] = given[e.args[0]]
            elif e.op == "const":
                values[id(e)] = torch.tensor(e.args[0])
            else:
                values[id(e)] = OPS[e.op].torch(*[values[id(a)] for a in e.args])
        return values[id(self.expression)]


def formula(function: Function, part: Part, field: str) -> Function:
    """What an elementwise function is at this moment, as a snapshot; a function that is no formula stays as it is."""
    if field in DIFFERENTIATED.get(type(part), ()):
        refuse_learned(function)
    first = next((fields[field] for kind, fields in ELEMENTWISE.items() if type(part) is kind and field in fields), None)
    if first is None:
        return function
    names = (*first, *asks(function, len(first)))
    try:
        expression = trace(function, [var(name) for name in first], {name: var(name) for name in names})
    except Untraceable:
        return function
    return Snapshot(Formula(expression, names), (expression, names), function)


def refuse_learned(function: Function) -> None:
    """Gradients reach what is declared as an input, not what a function captured."""
    if not torch.is_grad_enabled():
        return
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if cell != type(cell)()]
    for held in (function, getattr(function, "__self__", None), *cells):
        learned = (
            held.requires_grad
            if isinstance(held, Tensor)
            else isinstance(held, nn.Module) and any(p.requires_grad for p in held.parameters())
        )
        if learned:
            raise RegardError(
                f"function {show(function)} captured a {type(held).__name__} that requires gradients, which would not reach it; "
                "declare it with inputs=(Input(name, shape),), ask for it by name and pass it to attend (or detach it)"
            )
