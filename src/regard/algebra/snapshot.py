"""Plain functions as they are at a call: what they captured is compared by content, so that nothing old is ever used again.

A function that is written down with all it captured (numbers, strings, other such functions) becomes a `Snapshot`, which equals
every function of the same code and contents. What captures anything else (a tensor, a list, an object with attributes) is *live*: its
contents may change at any time, so descriptions that hold it are never a key of a cache.
"""

from __future__ import annotations

import builtins
import enum
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .part import Bound, Function, Part

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R", bound=Part)

StandIn = Callable[[Any, Part, str], Any]
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, enum.Enum, type(Ellipsis))
COMPILED = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, type(torch.Tensor.add_))
STEADY_HOMES = ("torch", "math", "operator", "builtins", "regard", "functools", "typing")


RESTLESS = 16
_contents: dict[Any, set[int]] = {}  # of each code object, hashes of the contents it came with


class Live(Exception):
    """A value whose contents cannot be written down."""


class Snapshot:
    """A plain function with copies of all it captured, equal to every other of the same code and contents.

    restless: the same code came with many contents, so what is made for one of them will hardly be used again.
    """

    def __init__(self, function: Function, content: Any, like: Any):
        self.function, self.content, self._hash = function, content, hash(content)
        self.__module__ = getattr(like, "__module__", type(like).__module__)
        self.__name__, self.__qualname__ = (str(getattr(like, name, type(like).__name__)) for name in ("__name__", "__qualname__"))
        known = _contents.setdefault(getattr(like, "__code__", type(like)), set())
        if len(known) <= RESTLESS:
            known.add(self._hash)
        self.restless = len(known) > RESTLESS

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Snapshot) and self._hash == other._hash and self.content == other.content)


def is_compiled(value: Any) -> bool:
    """Whether a value is a C function of no object: a bound method (of a dict, a tensor) sees what its object holds, which may change."""
    return isinstance(value, COMPILED) and isinstance(getattr(value, "__self__", None), (type(None), types.ModuleType, type))


def home(value: Any) -> str:
    return str(getattr(value, "__module__", None) or getattr(value, "__name__", "")).partition(".")[0]


def names_in(code: types.CodeType) -> Iterator[str]:
    """Global and attribute names that a function and the functions inside it read."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def written(value: Any, around: tuple[str, ...] = (), seen: tuple[int, ...] = ()) -> tuple[Any, Any]:
    """(content, copy) of a captured value: what it equals, and what stands for it; raises Live. around: names its reader looks up in it."""
    kind = type(value)
    if kind is float:
        return (kind, repr(value)), value  # tells -0.0 from 0.0, and knows NaN again
    if kind in PLAIN or isinstance(value, enum.Enum):
        return (kind, value), value
    if isinstance(value, (tuple, frozenset)):
        each = [written(item, around, seen) for item in value]
        return (kind, tuple(content for content, _ in each)), kind(copy for _, copy in each) if kind in (tuple, frozenset) else value
    if is_compiled(value):
        return ("compiled", id(value), getattr(value, "__qualname__", "")), value
    if isinstance(value, types.FunctionType):
        return of_function(value, seen)
    if isinstance(value, (types.ModuleType, type)):
        return of_namespace(value, around, seen)
    if isinstance(value, Snapshot):
        return value.content, value
    if isinstance(value, Bound):
        inner = written(value.function, (), seen)
        constants = tuple((name, written(item, (), seen)) for name, item in value.constants)
        content = ("bound", inner[0], tuple((name, item[0]) for name, item in constants))
        return content, Bound(inner[1], tuple((name, item[1]) for name, item in constants))
    if isinstance(value, Part):
        copy = as_now(value)
        if not fixed(copy):
            raise Live
        return copy, copy
    raise Live


def of_namespace(value: Any, around: tuple[str, ...], seen: tuple[int, ...]) -> tuple[Any, Any]:
    """A module or class: of torch's and Python's own nothing changes; of others, what the reader may look up there."""
    if home(value) in STEADY_HOMES:
        return ("name", id(value)), value
    inside = vars(value)
    read = tuple((name, written(inside[name], (), seen)[0]) for name in dict.fromkeys(around) if name in inside)
    if read:  # a copy would have to be a namespace of its own
        raise Live
    return ("name", id(value)), value


def of_function(function: types.FunctionType, seen: tuple[int, ...]) -> tuple[Any, Any]:
    if id(function) in seen or function.__dict__:  # calls itself, or carries attributes
        raise Live
    seen = (*seen, id(function))
    if home(function) in ("regard", "torch") and function.__closure__ is None:
        return function, function
    code = function.__code__
    around = tuple(names_in(code))
    space = function.__globals__
    cells = [written(cell_of(cell), around, seen) for cell in function.__closure__ or ()]
    known = {name: written(space[name], around, seen) for name in dict.fromkeys(around) if name in space}
    defaults = written(function.__defaults__ or (), around, seen)
    options = {name: written(item, around, seen) for name, item in (function.__kwdefaults__ or {}).items()}
    content = (
        code,
        tuple(content for content, _ in cells),
        tuple((name, content) for name, (content, _) in known.items()),
        defaults[0],
        tuple((name, content) for name, (content, _) in options.items()),
    )
    copy = types.FunctionType(
        code,
        {"__builtins__": builtins, "__name__": function.__module__, **{name: value for name, (_, value) in known.items()}},
        function.__name__,
        defaults[1] or None,
        tuple(types.CellType(value) for _, value in cells) or None,
    )
    copy.__kwdefaults__ = {name: value for name, (_, value) in options.items()} or None
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    return content, copy


def cell_of(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        raise Live from None


def is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, (Part, type))


def steady(function: Any) -> bool:
    """Whether a function can never change: compiled, or the library's own at the top of a module, or a snapshot."""
    if isinstance(function, Bound):
        try:
            return steady(function.function) and all(written(value) is not None for _, value in function.constants)
        except Live:
            return False
    if isinstance(function, Snapshot) or is_compiled(function):
        return True
    if not isinstance(function, types.FunctionType) or function.__closure__ is not None:
        return False
    return home(function) in ("regard", "torch")


def fixed(part: Part) -> bool:
    """Whether a description can key a cache: none of its functions can change."""
    found = part.__dict__.get("_fixed")
    if found is None:
        found = all(settled(getattr(part, field.name)) for field in fields(part))  # type: ignore[arg-type]
        object.__setattr__(part, "_fixed", found)
    return bool(found)


def settled(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(settled(item) for item in value)
    if isinstance(value, Part):
        return fixed(value)
    if isinstance(value, torch.Tensor):
        return False
    return not is_function(value) or steady(value)


def as_now(part: R, stand_in: StandIn | None = None) -> R:
    """The description with a snapshot for each function that could change; `stand_in(function, part, field)` may replace live ones."""
    if fixed(part):
        return part
    changed: dict[str, Any] = {}
    for field in fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        new = value_now(value, part, field.name, stand_in)
        if new is not value:
            changed[field.name] = new
    return replace(part, **changed) if changed else part  # type: ignore[type-var]


def value_now(value: Any, part: Part, name: str, stand_in: StandIn | None) -> Any:
    if isinstance(value, Part):
        return as_now(value, stand_in)
    if isinstance(value, tuple):
        each = tuple(value_now(item, part, name, stand_in) for item in value)
        return each if any(a is not b for a, b in zip(each, value, strict=True)) else value
    if not is_function(value) or steady(value):
        return value
    return function_now(value, part, name, stand_in)


def function_now(function: Function, part: Part, name: str, stand_in: StandIn | None) -> Function:
    try:
        content, copy = written(function)
    except Live:
        return function if stand_in is None else stand_in(function, part, name)
    return Snapshot(copy, content, function) if isinstance(copy, types.FunctionType) else copy


def restless(part: Part) -> bool:
    """Whether a description's functions came with so many contents that what is compiled for one will hardly be used again."""
    values = (getattr(inner, field.name) for inner in part.parts() for field in fields(inner))  # type: ignore[arg-type]
    return any(isinstance(value, Snapshot) and value.restless for value in values)


def untraced() -> AbstractContextManager[Any]:
    """Inside, tensors are real and seen by no trace: for what depends on sizes and descriptions alone while torch.export or a meter records."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext()


def remembered(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """`functools.lru_cache` for functions of descriptions: those that hold live functions are computed anew, and never kept."""

    def wrap(compute: Callable[P, T]) -> Callable[P, T]:
        def lasting(*args: P.args, **kwargs: P.kwargs) -> T:
            # What is kept must serve training as well, and must be no fake or recorded tensor of a call that is only traced.
            with torch.inference_mode(False), untraced():
                return compute(*args, **kwargs)

        cached = functools.lru_cache(maxsize=maxsize)(lasting)

        @functools.wraps(compute)
        def ask(*args: P.args, **kwargs: P.kwargs) -> T:
            if all(fixed(x) for x in (*args, *kwargs.values()) if isinstance(x, Part)):
                return cached(*args, **kwargs)  # type: ignore[arg-type]
            return compute(*args, **kwargs)

        ask.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
        ask.cache_info = cached.cache_info  # type: ignore[attr-defined]
        return ask

    return wrap
