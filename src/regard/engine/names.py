"""How a name becomes a description."""

from __future__ import annotations

from ..algebra.mechanism import Mechanism
from ..errors import RegardError
from ..lazy import catalogue


def resolved(mechanism: str | Mechanism) -> Mechanism:
    if isinstance(mechanism, str):
        found: Mechanism = catalogue()(mechanism)
        return found
    if not isinstance(mechanism, Mechanism):
        raise RegardError(f"mechanism is {type(mechanism).__name__}; expected a name (see regard.names()) or a description")
    return mechanism
