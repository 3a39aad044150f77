"""The one exception callers meet: what was wrong, what came, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RegardError(ValueError):
    """A call regard cannot honour. The message names the argument, what came, what was expected and what to do."""


class MissingDependency(RegardError, ImportError):
    """An optional package is needed; the message says which extra installs it."""


def nearest(word: str, known: Iterable[str], count: int = 4) -> str:
    """`did you mean ...?` for a mistyped name, or the empty string."""
    close = difflib.get_close_matches(word, list(known), n=count, cutoff=0.4)
    return f" Did you mean {', '.join(close)}?" if close else ""
