"""Writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import RegardError


def prepare(folder: Path, what: str) -> None:
    """Make a folder that will be written in; RegardError, which names `what` asked for it, if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as why:
        raise RegardError(f"{what}: cannot write there ({why.strerror})") from None


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name beside `path`, then rename; RegardError if that is not possible."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as why:
        part.unlink(missing_ok=True)
        raise RegardError(f"cannot write {path}: {why.strerror}") from None
