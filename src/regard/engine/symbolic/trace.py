"""From a plain PyTorch function to an expression."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...algebra.part import Function, asks, show
from ...errors import RegardError
from .expression import ONE, Expr, Z, add, const, div, is_const, mul, neg, node, sub, where


class Untraceable(RegardError):
    """A function does something the expression language has no word for."""


def un(op: str) -> Callable[[Expr], Expr]:
    return lambda a: node(op, a)


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
        if x.requires_grad and torch.is_grad_enabled():
            raise RegardError(
                "a function uses a tensor that requires gradients, which would not reach it; declare it with inputs=(Input(name, shape),), "
                "ask for it by name and pass it to attend (or detach it)"
            )
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
    "detach": un("detach"),
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
