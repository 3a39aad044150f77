"""How a name becomes a description."""

from __future__ import annotations

from collections.abc import Callable

from ..algebra.mechanism import Mechanism
from ..errors import RegardError

_resolve: list[Callable[[str], Mechanism]] = []


def names_resolver(resolve: Callable[[str], Mechanism]) -> None:
    """The catalogue tells the engine how a name becomes a description; the engine never imports the catalogue."""
    _resolve[:] = [resolve]


def resolved(mechanism: str | Mechanism) -> Mechanism:
    if isinstance(mechanism, str):
        return _resolve[0](mechanism)
    if not isinstance(mechanism, Mechanism):
        raise RegardError(f"mechanism is {type(mechanism).__name__}; expected a name (see regard.names()) or a description")
    return mechanism
