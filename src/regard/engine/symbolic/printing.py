"""Expressions printed as lines of Triton or C."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

from .expression import OPS, Expr, topological


def triton_lines(outputs: Mapping[str, Expr], indent: str, prefix: str = "t") -> list[str]:
    """Assignments that compute the outputs, readable and in order; variables keep their names."""
    names: dict[int, str] = {}
    lines: list[str] = []

    def text(e: Any) -> str:
        if e.op == "var":
            return str(e.args[0])
        if e.op == "const":
            value = e.args[0]
            return repr(value) if not isinstance(value, float) or math.isfinite(value) else f"float('{value}')"
        return names[id(e)]

    for e in topological(list(outputs.values())):
        if e.op in OPS:
            names[id(e)] = f"{prefix}{len(names)}"
            if e.op == "pow" and e.args[1].op == "const" and float(e.args[1].args[0]).is_integer() and e.args[1].args[0] > 0:
                body = " * ".join([text(e.args[0])] * int(e.args[1].args[0]))
            elif e.op == "pow":  # 0 ** p is 0 for p > 0, and log(0) must not be formed
                base = text(e.args[0])
                body = f"tl.where({base} > 0, tl.exp(tl.log(tl.where({base} > 0, {base}, 1.0)) * {text(e.args[1])}), 0.0)"
            else:
                body = OPS[e.op].triton.format(*[text(a) for a in e.args])
            lines.append(f"{indent}{names[id(e)]} = {body}")
    lines += [f"{indent}{name} = {text(e)}" for name, e in outputs.items()]
    return lines


INTEGERS = ("b", "h", "i", "j")
TESTS = ("gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not")


def c_type(e: Expr) -> str:
    """int for indices, tests and what is computed from them; else float."""
    if e.op == "var":
        return "int" if e.args[0] in INTEGERS else "float"
    if e.op == "const":
        return "float" if isinstance(e.args[0], float) else "int"
    if e.op in TESTS:
        return "int"
    if e.op in ("add", "sub", "mul", "neg", "abs", "relu", "maximum", "minimum", "where", "mod", "floordiv"):
        return "int" if all(c_type(a) == "int" for a in e.args[e.op == "where" :]) else "float"
    return "float"


def c_lines(outputs: Mapping[str, Expr], indent: str, moving: Container[str], prefix: str = "t") -> tuple[str, str]:
    """Declarations that compute the outputs in C: (what depends on none of the `moving` variables, what does)."""
    names: dict[int, str] = {}
    moves: set[int] = set()
    lines: tuple[list[str], list[str]] = ([], [])

    def text(e: Expr) -> str:
        if e.op == "var":
            return str(e.args[0])
        if e.op != "const":
            return names[id(e)]
        value = e.args[0]
        if not isinstance(value, float):
            return str(int(value))
        return f"{value!r}f" if math.isfinite(value) else "NAN" if math.isnan(value) else "INFINITY" if value > 0 else "(-INFINITY)"

    for e in topological(list(outputs.values())):
        if e.args[0] in moving if e.op == "var" else any(id(a) in moves for a in e.args):
            moves.add(id(e))
        if e.op in OPS:
            names[id(e)] = f"{prefix}{len(names)}"
            form = OPS[e.op].c
            if e.op in ("mod", "floordiv") and c_type(e) == "float":
                form = "fmod_({0}, {1})" if e.op == "mod" else "__builtin_floorf({0} / {1})"
            if e.op == "pow":  # looked at outside the loop where the exponent is fixed, or the loop would not vectorise
                sign, y = f"{names[id(e)]}_sign", e.args[1]
                lines[id(y) in moves].append(f"{indent}const float {sign} = pow_sign_({text(y)});")
                form = f"pow_({{0}}, {{1}}, {sign})"
            lines[id(e) in moves].append(f"{indent}const {c_type(e)} {names[id(e)]} = {form.format(*[text(a) for a in e.args])};")
    for name, e in outputs.items():
        lines[id(e) in moves].append(f"{indent}const {c_type(e)} {name} = {text(e)};")
    return "\n".join(lines[0]), "\n".join(lines[1])
