"""Expressions: nodes, the table of operations, and differentiation.

One table says, for each operation, how PyTorch computes it, how Triton and C spell it, and its derivative. The generated kernels,
the tiled executor's programs and their backward passes are all read off the same expressions.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Expr:
    """A node: an operation on nodes, a named variable ("var", name) or a number ("const", value). Equal nodes are one object."""

    op: str
    args: tuple[Any, ...]

    def __repr__(self) -> str:
        return str(self.args[0]) if self.op in ("var", "const") else f"{self.op}({', '.join(map(repr, self.args))})"


_nodes: weakref.WeakValueDictionary[tuple[Any, ...], Expr] = weakref.WeakValueDictionary()


def node(op: str, *args: Any) -> Expr:
    """The node of that operation, shared with every equal one; operations on numbers are carried out."""
    if op in OPS and op != "where" and all(isinstance(a, Expr) and a.op == "const" for a in args):
        value = OPS[op].torch(*[torch.tensor(a.args[0], dtype=torch.float64) for a in args]).item()
        return node("const", value)
    key = (op, *[id(a) if isinstance(a, Expr) else (type(a), a) for a in args])
    found = _nodes.get(key)
    if found is None:
        found = _nodes[key] = Expr(op, args)
    return found


def var(name: str) -> Expr:
    return node("var", name)


def const(value: float | bool) -> Expr:
    return node("const", value if isinstance(value, (bool, int)) else float(value))


def is_const(e: Expr, value: float | None = None) -> bool:
    return e.op == "const" and (value is None or e.args[0] == value)


def add(a: Expr, b: Expr) -> Expr:
    return b if is_const(a, 0) else a if is_const(b, 0) else node("add", a, b)


def sub(a: Expr, b: Expr) -> Expr:
    return a if is_const(b, 0) else neg(b) if is_const(a, 0) else node("sub", a, b)


def mul(a: Expr, b: Expr) -> Expr:
    if is_const(a, 0) or is_const(b, 0):
        return Z
    if is_const(a, 1):
        return b
    if is_const(b, 1):
        return a
    if a.op == "neg":
        return neg(mul(a.args[0], b))
    if b.op == "neg":
        return neg(mul(a, b.args[0]))
    return node("mul", a, b)


def neg(a: Expr) -> Expr:
    return a.args[0] if a.op == "neg" else const(-a.args[0]) if a.op == "const" else node("neg", a)


def div(a: Expr, b: Expr) -> Expr:
    return Z if is_const(a, 0) else a if is_const(b, 1) else node("div", a, b)


def where(test: Expr, a: Expr, b: Expr) -> Expr:
    if is_const(test):
        return a if test.args[0] else b
    return a if a is b else node("where", test, a, b)


def d_pow(x: Expr, y: Expr, g: Expr, out: Expr) -> tuple[Expr, Expr]:
    if y.op == "const":
        n = float(y.args[0])
        power = x if n == 2 else ONE if n == 1 else node("pow", x, const(n - 1))
        return mul(g, mul(const(n), power)), Z
    safe = node("gt", x, const(0.0))
    log = where(safe, node("log", where(safe, x, ONE)), Z)
    return mul(g, mul(y, node("pow", x, sub(y, ONE)))), mul(g, mul(out, log))


OPS: dict[str, Op] = {}
Z, ONE = const(0.0), const(1.0)


@dataclass(frozen=True)
class Op:
    """torch: the eager function. triton, c: format strings. grad: (*args, cotangent, out) -> a cotangent an argument."""

    torch: Callable[..., Any]
    triton: str
    c: str
    grad: Callable[..., tuple[Expr, ...]] | None = None


def erf_slope(x: Expr) -> Expr:
    return mul(const(2 / math.sqrt(math.pi)), node("exp", neg(mul(x, x))))


def relu_grad(a: Expr, g: Expr, out: Expr) -> Expr:
    """g where a > 0: as a product, which vectorises, unless g may be infinite where a is not positive."""
    if any(e.op in ("pow", "div", "log", "sqrt") for e in topological([g])):
        return where(node("gt", a, Z), g, Z)
    return mul(g, node("sign", out))


def chosen(test: str) -> Callable[..., tuple[Expr, ...]]:
    def grad(a: Expr, b: Expr, g: Expr, out: Expr) -> tuple[Expr, ...]:
        # Ties share the gradient in PyTorch's maximum; here the first operand takes it, a measure-zero choice.
        first = node(test, a, b)
        return where(first, g, Z), where(first, Z, g)

    return grad


OPS.update(
    {
        "add": Op(torch.add, "({0} + {1})", "({0} + {1})", lambda a, b, g, o: (g, g)),
        "sub": Op(torch.sub, "({0} - {1})", "({0} - {1})", lambda a, b, g, o: (g, neg(g))),
        "mul": Op(torch.mul, "({0} * {1})", "({0} * {1})", lambda a, b, g, o: (mul(g, b), mul(g, a))),
        "div": Op(torch.div, "({0} / {1})", "((float){0} / (float){1})", lambda a, b, g, o: (div(g, b), neg(div(mul(g, o), b)))),
        "neg": Op(torch.neg, "(-{0})", "(-{0})", lambda a, g, o: (neg(g),)),
        "exp": Op(torch.exp, "tl.exp({0})", "exp_({0})", lambda a, g, o: (mul(g, o),)),
        "expm1": Op(torch.expm1, "(tl.exp({0}) - 1.0)", "expm1_({0})", lambda a, g, o: (mul(g, add(o, ONE)),)),
        "log": Op(torch.log, "tl.log({0})", "log_({0})", lambda a, g, o: (div(g, a),)),
        "log1p": Op(torch.log1p, "tl.log(1.0 + {0})", "log1p_({0})", lambda a, g, o: (div(g, add(a, ONE)),)),
        "sqrt": Op(torch.sqrt, "tl.sqrt({0})", "__builtin_sqrtf({0})", lambda a, g, o: (div(g, mul(const(2.0), o)),)),
        "tanh": Op(torch.tanh, "(2.0 * tl.sigmoid(2.0 * ({0})) - 1.0)", "tanh_({0})", lambda a, g, o: (mul(g, sub(ONE, mul(o, o))),)),
        "sigmoid": Op(torch.sigmoid, "tl.sigmoid({0})", "sigmoid_({0})", lambda a, g, o: (mul(g, mul(o, sub(ONE, o))),)),
        "relu": Op(
            functools.partial(torch.clamp_min, min=0), "tl.maximum({0}, 0.0)", "({0} < 0 ? 0 : {0})", lambda a, g, o: (relu_grad(a, g, o),)
        ),
        "abs": Op(torch.abs, "tl.abs({0})", "({0} < 0 ? -{0} : {0})", lambda a, g, o: (mul(g, node("sign", a)),)),
        "sign": Op(torch.sign, "(tl.where({0} > 0, 1.0, 0.0) - tl.where({0} < 0, 1.0, 0.0))", "sign_({0})", lambda a, g, o: (Z,)),
        "erf": Op(torch.erf, "tl.erf({0})", "erff({0})", lambda a, g, o: (mul(g, erf_slope(a)),)),
        "sin": Op(torch.sin, "tl.sin({0})", "sinf({0})", lambda a, g, o: (mul(g, node("cos", a)),)),
        "cos": Op(torch.cos, "tl.cos({0})", "cosf({0})", lambda a, g, o: (neg(mul(g, node("sin", a))),)),
        "pow": Op(torch.pow, "tl.exp(tl.log({0}) * {1})", "pow_({0}, {1})", d_pow),
        "maximum": Op(torch.maximum, "tl.maximum({0}, {1})", "({0} < {1} ? {1} : {0})", chosen("ge")),
        "minimum": Op(torch.minimum, "tl.minimum({0}, {1})", "({1} < {0} ? {1} : {0})", chosen("le")),
        "where": Op(torch.where, "tl.where({0}, {1}, {2})", "({0} ? {1} : {2})", lambda t, a, b, g, o: (Z, where(t, g, Z), where(t, Z, g))),
        "gt": Op(torch.gt, "({0} > {1})", "({0} > {1})"),
        "ge": Op(torch.ge, "({0} >= {1})", "({0} >= {1})"),
        "lt": Op(torch.lt, "({0} < {1})", "({0} < {1})"),
        "le": Op(torch.le, "({0} <= {1})", "({0} <= {1})"),
        "eq": Op(torch.eq, "({0} == {1})", "({0} == {1})"),
        "ne": Op(torch.ne, "({0} != {1})", "({0} != {1})"),
        "and": Op(torch.logical_and, "({0} & {1})", "({0} & {1})"),
        "or": Op(torch.logical_or, "({0} | {1})", "({0} | {1})"),
        "not": Op(torch.logical_not, "(({0}) == 0)", "(!{0})"),
        "mod": Op(torch.remainder, "((({0}) % {1} + {1}) % {1})", "mod_({0}, {1})"),
        "detach": Op(torch.detach, "({0})", "({0})", lambda a, g, o: (Z,)),
        "floordiv": Op(torch.floor_divide, "(({0} - (({0}) % {1} + {1}) % {1}) // {1})", "floordiv_({0}, {1})"),
    }
)


def topological(roots: Sequence[Expr]) -> list[Expr]:
    """Every node below the roots, operands first."""
    order: list[Expr] = []
    seen: set[int] = set()

    def visit(e: Expr) -> None:
        if id(e) not in seen:
            seen.add(id(e))
            for a in e.args:
                if isinstance(a, Expr):
                    visit(a)
            order.append(e)

    for root in roots:
        visit(root)
    return order


def substitute(e: Expr, old: Expr, new: Expr) -> Expr:
    """`e` with `old` replaced by `new`."""
    done: dict[int, Expr] = {id(old): new}
    for x in topological([e]):
        if id(x) not in done:
            done[id(x)] = x if x.op in ("var", "const") else node(x.op, *[done[id(a)] for a in x.args])
    return done[id(e)]


def pullback(outputs: Sequence[Expr], cotangents: Sequence[Expr], wrt: Sequence[Expr]) -> list[Expr]:
    """sum_o cotangent_o * d output_o / d x, for each x of `wrt`, by reverse accumulation."""
    adjoint: dict[int, Expr] = {}
    for out, cotangent in zip(outputs, cotangents, strict=True):
        adjoint[id(out)] = add(adjoint[id(out)], cotangent) if id(out) in adjoint else cotangent
    for e in reversed(topological(outputs)):
        g = adjoint.get(id(e))
        rule = OPS[e.op].grad if e.op in OPS else None
        if g is None or rule is None:
            continue
        for a, ga in zip(e.args, rule(*e.args, g, e), strict=True):
            if not is_const(ga, 0):
                adjoint[id(a)] = add(adjoint[id(a)], ga) if id(a) in adjoint else ga
    return [adjoint.get(id(x), Z) for x in wrt]
