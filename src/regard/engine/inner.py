"""Attention inside attention: what a call is made of asks for attention again, at the door, which stands above and puts its functions here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_door: dict[str, Callable[..., Any]] = {}


def opened(attend: Callable[..., Any], attend_with_stats: Callable[..., Any]) -> None:
    """The door tells what stands below it how to call it; they never import the door."""
    _door.update(attend=attend, attend_with_stats=attend_with_stats)


def is_door(function: Callable[..., Any]) -> bool:
    """Whether a function is the door's `attend`, and not the reference's."""
    return function is _door["attend"]


def attend(*args: Any, **options: Any) -> Any:
    """`regard.attend`."""
    return _door["attend"](*args, **options)


def attend_with_stats(*args: Any, **options: Any) -> Any:
    """`regard.attend_with_stats`."""
    return _door["attend_with_stats"](*args, **options)
