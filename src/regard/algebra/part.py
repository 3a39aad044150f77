"""What every description is made of: immutable parts, plain functions called by name, and declared inputs."""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar, dataclass_transform

import torch
from torch import Tensor

from ..errors import RegardError

Function = Callable[..., Any]
T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def described(cls: type[T]) -> type[T]:
    """A frozen dataclass printed as the Python that rebuilds it, whose hash is computed once: descriptions key every cache."""
    cls = dataclass(frozen=True, repr=False)(cls)
    compute = cls.__hash__

    def cached(self: Any) -> int:
        try:
            return self.__dict__["_hash"]  # type: ignore[no-any-return]
        except KeyError:
            object.__setattr__(self, "_hash", compute(self))
            return self.__dict__["_hash"]  # type: ignore[no-any-return]

    cls.__hash__ = cached  # type: ignore[assignment, method-assign]
    return cls


class Part:
    """Base of all descriptions: hashable, comparable, and printed as the Python that rebuilds it.

    A function inside a part prints as its import path; a lambda or a local function has no such path, so it prints as
    `<function ...>` and only that part of the repr is not Python.
    """

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            elif isinstance(value, functools.partial):
                object.__setattr__(self, field.name, Bound(value.func, tuple(sorted(value.keywords.items()))))

    def __repr__(self) -> str:
        shown = []
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.repr and not (field.default is value or field.default == value):
                shown.append(f"{field.name}={show(value)}")
        return f"regard.algebra.{type(self).__qualname__}({', '.join(shown)})"

    def parts(self) -> Iterator[Part]:
        """Every part inside this one, itself first."""
        yield self
        yield from self._inside

    @functools.cached_property
    def _inside(self) -> tuple[Part, ...]:
        found: list[Part] = []
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Part):
                    found += item.parts()
        return tuple(found)


def show(value: Any) -> str:
    """Python source for a field's value."""
    if isinstance(value, tuple):
        return "(" + "".join(show(item) + ", " for item in value) + ")"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if callable(value) and not isinstance(value, (Part, Bound)):
        module: str | None = getattr(value, "__module__", None)
        name: str = getattr(value, "__qualname__", repr(value))
        if module is None or module.startswith("torch"):
            for home in (torch, torch.nn.functional):
                if getattr(home, getattr(value, "__name__", ""), None) is value:
                    return f"{home.__name__}.{value.__name__}"  # type: ignore[union-attr]
        return f"{module}.{name}" if "<" not in name else f"<function {name}>"
    return repr(value)


@described
class Bound:
    """A function with some keyword constants fixed; unlike `functools.partial` it compares and hashes by content."""

    function: Function
    constants: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **dict(self.constants), **kwargs)

    def __repr__(self) -> str:
        return f"regard.algebra.Bound({show(self.function)}, {show(self.constants)})"


def bind(function: Function, /, **constants: Any) -> Bound:
    """`function` with keyword `constants` fixed, comparable and hashable."""
    return Bound(function, tuple(sorted(constants.items())))


def asks(function: Function, positional: int = 1) -> tuple[str, ...]:
    """Names of the parameters a function wants beyond its first `positional` ones (those without a default)."""
    bound: set[str] = set()
    while not isinstance(function, types.FunctionType):
        if isinstance(function, Bound):
            bound |= {name for name, _ in function.constants}
        elif not hasattr(function, "content"):  # of a snapshot: the function inside
            break
        function = function.function  # type: ignore[attr-defined]
    if isinstance(function, types.FunctionType) and not function.__dict__:
        found = asked_by(function.__code__, len(function.__defaults__ or ()), frozenset(function.__kwdefaults__ or ()), positional)
    else:
        found = asked_of(function, positional)
    return tuple(name for name in found if name not in bound) if bound else found


@functools.lru_cache(maxsize=4096)
def asked_by(code: types.CodeType, defaults: int, options: frozenset[str], positional: int) -> tuple[str, ...]:
    """As `asks`, of a function's code: nothing a function captured is kept."""
    places, keywords = code.co_argcount, code.co_kwonlyargcount
    named = code.co_varnames[positional : max(positional, places - defaults)]
    return (*named, *(name for name in code.co_varnames[places : places + keywords] if name not in options))


def asked_of(function: Function, positional: int) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # C functions such as torch.relu
        return ()
    rest = [p for p in parameters[positional:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return tuple(p.name for p in rest if p.default is p.empty)


def call(function: Function, *first: Any, env: Mapping[str, Any]) -> Any:
    """Call a plain function: its leading arguments by place, every further one by its name in `env`."""
    names = asks(function, len(first))
    try:
        return function(*first, **{name: env[name] for name in names})
    except KeyError as missing:
        raise RegardError(
            f"function {show(function)} asks for {missing}, which is neither an index nor a declared input; known names "
            f"here: {', '.join(sorted(env))}. Declare it with inputs=(Input({missing}, ...),) and pass it to attend."
        ) from None


@dataclass(frozen=True)
class Sizes:
    """The sizes of one attention call."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    value_dim: int

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute: no sequences, no queries, or no keys."""
        return 0 in (self.batch, self.q_len, self.k_len)

    def letter(self, letter: str) -> int | None:
        table = {
            "b": self.batch,
            "h": self.heads,
            "g": self.kv_heads,
            "q": self.q_len,
            "k": self.k_len,
            "d": self.head_dim,
            "e": self.value_dim,
        }
        return table.get(letter)


@described
class Learned(Part):
    """The layer owns it: a parameter of `init(sizes)` (a number fills it), passed through `transform` at every call."""

    init: float | Function = 0.0
    transform: Function | None = None
    trainable: bool = True


@described
class Projected(Part):
    """The layer computes it from its input: `transform(x W (+ bias))`, through a bottleneck of `rank` if given.

    channels: of the input's last dimension, where its letter is f. times: so many projections side by side, for `transform` to join.
    grouped: one a key head, which its query heads share.
    """

    transform: Function | None = None
    rank: int | None = None
    bias: float | None = None
    channels: int | None = None
    times: int = 1
    grouped: bool = False


@described
class Headwise(Part):
    """The layer reads it off its own heads: `transform(w_h . act(x_h))` with x the heads' `source`, "q", "k" or "v".

    act: a plain function, or None for x itself. w starts at N(0, std^2).
    """

    source: str = "q"
    transform: Function | None = None
    act: Function | None = torch.nn.functional.gelu
    std: float = 0.0


# What functions are told by these names already, or what calls take by them.
TAKEN = frozenset(
    ["b", "h", "i", "j", "q", "k", "v", "n", "offset", "k_len", "mask", "scale", "executor", "state", "return_state", "dropout_p", "source"]
)


@described
class Input(Part):
    """A tensor a mechanism reads beside q, k and v.

    shape: letters, one a dimension: b batch, h query heads, q queries, k keys, d head_dim, e value_dim, f free; "" is a
    scalar. With letters from `bhqk` only (in this order) it is elementwise: broadcast against scores, sliced by tiles, and
    differentiable in every executor. `default` is a number, a function of any of (sizes, n), or None: then the caller must
    pass it. `layer` says how `regard.nn.Attention` makes it. `dtype` is "float", "int" or "bool".
    `at_least`: the smallest value it may hold.
    """

    name: str
    shape: str = ""
    default: float | Function | str | None = None
    layer: Learned | Projected | Headwise | None = None
    dtype: str = "float"
    at_least: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name.isidentifier() or self.name in TAKEN:
            raise RegardError(f"an input called {self.name!r}; expected a name of Python's that is none of {', '.join(sorted(TAKEN))}")

    @property
    def elementwise(self) -> bool:
        return all(letter in "bhqk" for letter in self.shape) and list(self.shape) == sorted(self.shape, key="bhqk".find)

    def check(self, value: Tensor, sizes: Sizes) -> None:
        """Raise unless `value` has the declared shape (a size-1 dimension broadcasts) and kind of dtype."""
        wanted = " ".join(f"{letter}={sizes.letter(letter) or 'any'}" for letter in self.shape) or "scalar"
        ok = value.dim() == len(self.shape) and all(
            sizes.letter(letter) is None or size in (1, sizes.letter(letter)) for letter, size in zip(self.shape, value.shape, strict=False)
        )
        if not ok:
            raise RegardError(f"input {self.name!r} has shape {tuple(value.shape)}; expected ({wanted}), where 1 broadcasts")
        kind = "bool" if value.dtype == torch.bool else "float" if value.is_floating_point() else "int"
        if kind != self.dtype and not (self.dtype == "float" and kind == "int"):
            raise RegardError(f"input {self.name!r} has dtype {value.dtype}; expected {self.dtype}")
        if self.at_least is not None and bool((value < self.at_least).any()):
            raise RegardError(f"input {self.name!r} goes down to {float(value.min()):.3g}; expected values of at least {self.at_least:g}")

    def canonical(self, value: Tensor) -> Tensor:
        """The elementwise form (b|1, h|1, q|1, k|1)."""
        index = 0
        for place, letter in enumerate("bhqk"):
            if letter in self.shape:
                index += 1
            else:
                value = value.unsqueeze(place)
        return value
