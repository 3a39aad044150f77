"""Elementwise functions as expressions: traced from plain PyTorch functions, differentiated, and printed or run.

One table of operations says, for each, how PyTorch computes it, how Triton spells it, and its derivative. The Triton kernel,
the tiled executor's programs and their backward passes are all read off the same expressions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algebra.part import Function, asks, show
from ..errors import RegardError


class Untraceable(RegardError):
    """A function does something the expression language has no word for."""


@dataclass(frozen=True, eq=False)
class Expr:
    """A node: an operation on nodes, a named variable ("var", name) or a number ("const", value). Equal nodes are one object."""

    op: str
    args: tuple[Any, ...]

    def __repr__(self) -> str:
        return str(self.args[0]) if self.op in ("var", "const") else f"{self.op}({', '.join(map(repr, self.args))})"


_nodes: dict[tuple[Any, ...], Expr] = {}


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
    return a if a is b else node("where", test, a, b)


def un(op: str) -> Callable[[Expr], Expr]:
    return lambda a: node(op, a)


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
    """torch: the eager function. triton: a format string. grad: (*args, cotangent, out) -> a cotangent an argument."""

    torch: Callable[..., Any]
    triton: str
    grad: Callable[..., tuple[Expr, ...]] | None = None
    out: bool = True


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
        "add": Op(torch.add, "({0} + {1})", lambda a, b, g, o: (g, g)),
        "sub": Op(torch.sub, "({0} - {1})", lambda a, b, g, o: (g, neg(g))),
        "mul": Op(torch.mul, "({0} * {1})", lambda a, b, g, o: (mul(g, b), mul(g, a))),
        "div": Op(torch.div, "({0} / {1})", lambda a, b, g, o: (div(g, b), neg(div(mul(g, o), b)))),
        "neg": Op(torch.neg, "(-{0})", lambda a, g, o: (neg(g),)),
        "exp": Op(torch.exp, "tl.exp({0})", lambda a, g, o: (mul(g, o),)),
        "expm1": Op(torch.expm1, "(tl.exp({0}) - 1.0)", lambda a, g, o: (mul(g, add(o, ONE)),)),
        "log": Op(torch.log, "tl.log({0})", lambda a, g, o: (div(g, a),)),
        "log1p": Op(torch.log1p, "tl.log(1.0 + {0})", lambda a, g, o: (div(g, add(a, ONE)),)),
        "sqrt": Op(torch.sqrt, "tl.sqrt({0})", lambda a, g, o: (div(g, mul(const(2.0), o)),)),
        "tanh": Op(torch.tanh, "(2.0 * tl.sigmoid(2.0 * ({0})) - 1.0)", lambda a, g, o: (mul(g, sub(ONE, mul(o, o))),)),
        "sigmoid": Op(torch.sigmoid, "tl.sigmoid({0})", lambda a, g, o: (mul(g, mul(o, sub(ONE, o))),)),
        "relu": Op(functools.partial(torch.clamp_min, min=0), "tl.maximum({0}, 0.0)", lambda a, g, o: (relu_grad(a, g, o),)),
        "abs": Op(torch.abs, "tl.abs({0})", lambda a, g, o: (mul(g, node("sign", a)),)),
        "sign": Op(torch.sign, "(tl.where({0} > 0, 1.0, 0.0) - tl.where({0} < 0, 1.0, 0.0))", lambda a, g, o: (Z,)),
        "erf": Op(torch.erf, "tl.erf({0})", lambda a, g, o: (mul(g, erf_slope(a)),)),
        "sin": Op(torch.sin, "tl.sin({0})", lambda a, g, o: (mul(g, node("cos", a)),)),
        "cos": Op(torch.cos, "tl.cos({0})", lambda a, g, o: (neg(mul(g, node("sin", a))),)),
        "pow": Op(torch.pow, "tl.exp(tl.log({0}) * {1})", d_pow),
        "maximum": Op(torch.maximum, "tl.maximum({0}, {1})", chosen("ge")),
        "minimum": Op(torch.minimum, "tl.minimum({0}, {1})", chosen("le")),
        "where": Op(torch.where, "tl.where({0}, {1}, {2})", lambda t, a, b, g, o: (Z, where(t, g, Z), where(t, Z, g))),
        "gt": Op(torch.gt, "({0} > {1})", None, False),
        "ge": Op(torch.ge, "({0} >= {1})", None, False),
        "lt": Op(torch.lt, "({0} < {1})", None, False),
        "le": Op(torch.le, "({0} <= {1})", None, False),
        "eq": Op(torch.eq, "({0} == {1})", None, False),
        "ne": Op(torch.ne, "({0} != {1})", None, False),
        "and": Op(torch.logical_and, "({0} & {1})", None, False),
        "or": Op(torch.logical_or, "({0} | {1})", None, False),
        "not": Op(torch.logical_not, "(({0}) == 0)", None, False),
        "mod": Op(torch.remainder, "((({0}) % {1} + {1}) % {1})", None, False),
        "floordiv": Op(torch.floor_divide, "(({0} - (({0}) % {1} + {1}) % {1}) // {1})", None, False),
    }
)


def softplus(x: Expr, beta: float = 1.0, threshold: float = 20.0) -> Expr:
    scaled = mul(x, const(beta))
    return add(node("relu", x), div(node("log1p", node("exp", neg(node("abs", scaled)))), const(beta)))


def gelu(x: Expr, approximate: str = "none") -> Expr:
    if approximate == "tanh":
        inner = mul(const(math.sqrt(2 / math.pi)), add(x, mul(const(0.044715), mul(x, mul(x, x)))))
        return mul(mul(const(0.5), x), add(ONE, node("tanh", inner)))
    return mul(mul(const(0.5), x), add(ONE, node("erf", mul(x, const(1 / math.sqrt(2))))))


def clamp(x: Expr, min: Any = None, max: Any = None) -> Expr:
    x = x if min is None else node("relu", x) if is_const(lift(min), 0) else node("maximum", x, lift(min))
    return x if max is None else node("minimum", x, lift(max))


def power(x: Expr, y: Any) -> Expr:
    y = lift(y)
    if y.op == "const" and y.args[0] in (2, 3):
        return mul(x, x) if y.args[0] == 2 else mul(x, mul(x, x))
    return ONE if is_const(y, 0) else x if is_const(y, 1) else node("sqrt", x) if is_const(y, 0.5) else node("pow", x, y)


def subtract(a: Any, b: Any, alpha: float = 1) -> Expr:
    return sub(lift(a), mul(const(alpha), lift(b)))


def plus(a: Any, b: Any, alpha: float = 1) -> Expr:
    return add(lift(a), mul(const(alpha), lift(b)))


def divide(a: Any, b: Any, rounding_mode: str | None = None) -> Expr:
    return node("floordiv", lift(a), lift(b)) if rounding_mode == "floor" else div(lift(a), lift(b))


def lift(x: Any) -> Expr:
    if isinstance(x, Expr):
        return x
    if isinstance(x, (bool, int, float)):
        return const(x)
    if isinstance(x, Tensor) and x.numel() == 1:
        return const(x.item())
    raise Untraceable(f"a constant of type {type(x).__name__} cannot be written into an expression")


WORDS: dict[str, Callable[..., Expr]] = {
    "add": plus,
    "sub": subtract,
    "subtract": subtract,
    "mul": lambda a, b: mul(lift(a), lift(b)),
    "multiply": lambda a, b: mul(lift(a), lift(b)),
    "truediv": lambda a, b: div(lift(a), lift(b)),
    "div": divide,
    "true_divide": lambda a, b: div(lift(a), lift(b)),
    "rsub": lambda a, b: sub(lift(b), lift(a)),
    "neg": neg,
    "negative": neg,
    "pow": lambda a, b: power(lift(a), b),
    "square": lambda a: mul(a, a),
    "exp2": lambda a: node("exp", mul(a, const(math.log(2)))),
    "log2": lambda a: div(node("log", a), const(math.log(2))),
    "reciprocal": lambda a: div(ONE, a),
    "rsqrt": lambda a: div(ONE, node("sqrt", a)),
    "relu": lambda a, inplace=False: node("relu", a),
    "relu6": lambda a, inplace=False: node("minimum", node("relu", a), const(6.0)),
    "softplus": softplus,
    "gelu": gelu,
    "silu": lambda a, inplace=False: mul(a, node("sigmoid", a)),
    "clamp": clamp,
    "clip": clamp,
    "clamp_min": lambda a, min: clamp(a, min),
    "clamp_max": lambda a, max: clamp(a, None, max),
    "absolute": un("abs"),
    "logsigmoid": lambda a: neg(softplus(neg(a))),
    "log_sigmoid": lambda a: neg(softplus(neg(a))),
    "sgn": un("sign"),
    "elu": lambda a, alpha=1.0, inplace=False: where(node("gt", a, Z), a, mul(const(alpha), node("expm1", node("minimum", a, Z)))),
    "where": lambda t, a, b: where(t, lift(a), lift(b)),
    "masked_fill": lambda a, t, v: where(t, lift(v), a),
    "and_": lambda a, b: node("and", a, lift(b)),
    "or_": lambda a, b: node("or", a, lift(b)),
    "logical_and": lambda a, b: node("and", a, b),
    "logical_or": lambda a, b: node("or", a, b),
    "invert": un("not"),
    "logical_not": un("not"),
    "bitwise_not": un("not"),
    "remainder": lambda a, b: node("mod", lift(a), lift(b)),
    "mod": lambda a, b: node("mod", lift(a), lift(b)),
    "floordiv": lambda a, b: node("floordiv", lift(a), lift(b)),
    "floor_divide": lambda a, b: node("floordiv", lift(a), lift(b)),
    "float": lambda a: a,
    "to": lambda a, *_, **__: a,
    "type_as": lambda a, b: a,
    "detach": lambda a: a,
    "contiguous": lambda a: a,
    "zeros_like": lambda a, **_: Z,
    "ones_like": lambda a, **_: ONE,
}
for _name in ("exp", "expm1", "log", "log1p", "sqrt", "tanh", "sigmoid", "abs", "sign", "erf", "sin", "cos"):
    WORDS[_name] = un(_name)
for _name in ("maximum", "minimum", "gt", "ge", "lt", "le", "eq", "ne"):
    WORDS[_name] = functools.partial(lambda op, a, b: node(op, lift(a), lift(b)), _name)


def trace(function: Function, first: Sequence[Expr], env: Mapping[str, Expr]) -> Expr:
    """The expression of a plain elementwise function applied to `first`, its further arguments taken by name from `env`.

    Raises Untraceable, naming the operation, for anything that is not elementwise or depends on values.
    """
    from torch import fx  # a tenth of a second to load: only when something is traced

    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    names = asks(function, len(first))
    missing = [name for name in names if name not in env]
    if missing:
        raise RegardError(f"function {show(function)} asks for {missing[0]!r}, which is neither an index nor a declared input")
    values: dict[fx.Node, Any] = {}

    def enter(name: str, value: Expr) -> fx.Proxy:
        place = graph.placeholder(name)
        values[place] = value
        return fx.Proxy(place, tracer)

    first_proxies = [enter(f"x{index}", value) for index, value in enumerate(first)]
    try:
        result = function(*first_proxies, **{name: enter(name, env[name]) for name in names})
    except (fx.proxy.TraceError, TypeError, RuntimeError) as why:
        raise Untraceable(f"function {show(function)} cannot be traced: {why}") from None
    for step in graph.nodes:
        if step.op == "placeholder":
            continue
        word = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", str(step.target))
        arguments = fx.node.map_arg(step.args, lambda n: values[n])
        options = fx.node.map_arg(step.kwargs, lambda n: values[n])
        if step.op not in ("call_function", "call_method") or word not in WORDS:
            raise Untraceable(f"function {show(function)} uses {word!r}, which has no elementwise form here; it runs in the tiled executor")
        values[step] = WORDS[word](*arguments, **options)
    return values[result.node] if isinstance(result, fx.Proxy) else lift(result)


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
        lines = []
        for at, e in enumerate(steps):
            target = next((names[id(a)] for a in e.args if id(a) in free and last[id(a)] == at), None)
            names[id(e)] = f"t{at}"
            lines.append(f"    t{at} = {python_call(e, names, target)}")
            if any(id(a) in full for a in e.args):
                full.add(id(e))
                if OPS[e.op].grad is not None:
                    free.add(id(e))
        result = ", ".join(names[id(e)] if id(e) in names else repr(e.args[0]) for e in outputs)
        body = "\n".join([f"def program({', '.join([*self.names, '**_'])}):", *lines, f"    return [{result}]"])
        space: dict[str, Any] = {"torch": torch}
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


def python_call(e: Expr, names: Mapping[int, str], target: str | None) -> str:
    """One PyTorch call; `target` is a buffer it may write to."""
    text = [names[id(a)] if id(a) in names else repr(a.args[0]) for a in e.args]
    number = [is_const(a) for a in e.args]
    out = f", out={target}" if target else ""
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
