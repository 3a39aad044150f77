"""Expressions run as a straight line of PyTorch calls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch

from .expression import OPS, Expr, is_const, topological, var


class Program:
    """Expressions compiled to a straight line of PyTorch calls that overwrite the buffers of values no longer needed.

    owned: variables of the tile's full shape whose buffers the program may use up. Everything computed from a full value is full.
    The source is generated from traced expressions alone; `source` shows it.
    """

    def __init__(self, outputs: Sequence[Expr], owned: Sequence[str]):
        order = topological(outputs)
        steps = [e for e in order if e.op in OPS]
        self.names = [e.args[0] for e in order if e.op == "var"]
        last = {id(a): at for at, e in enumerate(steps) for a in e.args if isinstance(a, Expr)}
        last |= {id(out): len(steps) for out in outputs}
        names = {id(e): str(e.args[0]) for e in order if e.op == "var"}
        full = {id(var(name)) for name in owned} | ({id(var("s"))} if "s" in self.names else set())
        free = {id(var(name)) for name in owned}
        whole = integers(order) if "s" in self.names else set()
        lines = []
        for at, e in enumerate(steps):
            target = next((names[id(a)] for a in e.args if id(a) in free and last[id(a)] == at), None)
            names[id(e)] = f"t{at}"
            lines.append(f"    t{at} = {python_call(e, names, target, whole)}")
            if any(id(a) in full for a in e.args):
                full.add(id(e))
                if OPS[e.op].grad is not None:
                    free.add(id(e))
        result = ", ".join(names[id(e)] if id(e) in names else repr(e.args[0]) for e in outputs)
        body = "\n".join([f"def program({', '.join([*self.names, '**_'])}):", *lines, f"    return [{result}]"])
        space: dict[str, Any] = {"torch": torch, "inf": math.inf, "nan": math.nan}  # as constants print
        exec(compile(body, "<regard program>", "exec"), space)  # noqa: S102 - text printed from traced expressions, never a user's string
        self.source, self.run = body, space["program"]

    def __call__(self, env: Mapping[str, Any]) -> list[Any]:
        return self.run(**env)  # type: ignore[no-any-return]


PYTHON_OUT = {
    "add",
    "sub",
    "mul",
    "div",
    "neg",
    "exp",
    "expm1",
    "log",
    "log1p",
    "sqrt",
    "tanh",
    "sigmoid",
    "abs",
    "sign",
    "erf",
    "sin",
    "cos",
}


INDICES = ("b", "h", "i", "j", "n")
CLOSED = ("add", "sub", "mul", "neg", "abs", "maximum", "minimum", "floordiv", "mod", "relu", "sign")


def integers(order: Sequence[Expr]) -> set[int]:
    """Those of some nodes, operands first, that are whole numbers: indices, and what is made of them without a division."""
    found: set[int] = set()
    for e in order:
        index = e.op == "var" and e.args[0] in INDICES
        number = e.op == "const" and isinstance(e.args[0], int) and not isinstance(e.args[0], bool)
        if index or number or (e.op in CLOSED and all(id(a) in found for a in e.args)):
            found.add(id(e))
    return found


def python_call(e: Expr, names: Mapping[int, str], target: str | None, whole: Set[int]) -> str:
    """One PyTorch call; `target` is a buffer it may write to, `whole` the nodes of whole numbers, which PyTorch would divide in float32."""
    text = [names[id(a)] if id(a) in names else repr(a.args[0]) for a in e.args]
    number = [is_const(a) for a in e.args]
    if OPS[e.op].grad is not None and id(e) not in whole and not any(id(a) not in whole and not is_const(a) for a in e.args):
        text = [t if is_number else f"{t}.to(s.dtype)" for t, is_number in zip(text, number, strict=True)]
    out = f", out={target}" if target else ""
    if e.op == "detach":  # a buffer of its own: the operand's may be overwritten
        return f"{text[0]}.clone()"
    if e.op == "relu":
        return f"torch.clamp_min({text[0]}, 0{out})"
    if e.op in ("maximum", "minimum") and any(number):
        at = 1 - number.index(True)
        return f"torch.clamp_{'min' if e.op == 'maximum' else 'max'}({text[at]}, {text[1 - at]}{out})"
    if e.op == "where" and target == text[1] and number[2]:
        return f"{text[1]}.masked_fill_(~{text[0]}, {text[2]})"
    if e.op == "where" and target == text[2] and number[1]:
        return f"{text[2]}.masked_fill_({text[0]}, {text[1]})"
    if e.op == "where" and number[1] and number[2]:
        return f"torch.where({text[0]}, {text[1]}, {text[2]}).to(s.dtype)"
    if e.op in ("add", "mul") and number[0]:
        text, number = text[::-1], number[::-1]
    if e.op in ("sub", "div", "mod", "floordiv", "pow") and number[0]:
        sign = {"sub": "-", "div": "/", "mod": "%", "floordiv": "//", "pow": "**"}[e.op]
        return f"{text[0]} {sign} {text[1]}"
    if e.op in ("eq", "ne", "gt", "ge", "lt", "le") and number[0] and not number[1]:
        turned = {"gt": "lt", "ge": "le", "lt": "gt", "le": "ge", "eq": "eq", "ne": "ne"}[e.op]
        return f"torch.{turned}({text[1]}, {text[0]})"
    word = {"mod": "remainder", "floordiv": "floor_divide", "and": "logical_and", "or": "logical_or", "not": "logical_not"}.get(e.op, e.op)
    return f"torch.{word}({', '.join(text)}{out if e.op in PYTHON_OUT or e.op == 'pow' else ''})"
