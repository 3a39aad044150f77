"""Byte-level text: a file of the user's, or the English and code that ship with every Python."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RegardError

SIZE = 4_000_000


@dataclass(frozen=True, eq=False)
class Corpus:
    """Bytes as int64-ready uint8 tensors: `train` and held-out `valid`, and where they came from."""

    name: str
    train: Tensor
    valid: Tensor

    def batch(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """`count` random windows of length + 1 training bytes, int64."""
        starts = torch.randint(len(self.train) - length, (count,), generator=generator)
        return torch.stack([self.train[s : s + length + 1] for s in starts.tolist()]).long()

    def held_out(self, length: int, limit: int) -> Tensor:
        """At most `limit` non-overlapping windows of length + 1 held-out bytes, spread over all of them."""
        count = (len(self.valid) - 1) // length
        chosen = torch.linspace(0, count - 1, min(limit, count)).long().unique() if count else torch.zeros(0, dtype=torch.long)
        return (
            torch.stack([self.valid[s * length : s * length + length + 1] for s in chosen.tolist()]).long()
            if count
            else torch.zeros(0, length + 1).long()
        )


def corpus(name: str, documents: list[bytes]) -> Corpus:
    """Every tenth document is held out; fewer than ten give the last tenth of their bytes."""
    if len(documents) < 10:
        whole = b"".join(documents)
        cut = len(whole) * 9 // 10
        parts = whole[:cut], whole[cut:]
    else:
        parts = b"".join(d for n, d in enumerate(documents) if n % 10 != 9), b"".join(documents[9::10])
    train, valid = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return Corpus(name, train, valid)


def python_text(size: int = SIZE) -> Corpus:
    """Python's own documentation topics (English) and standard-library sources (code), alternating, about `size` bytes."""
    from pydoc_data.topics import topics

    english = [text.encode() for _, text in sorted(topics.items())]
    home = Path(sysconfig.get_paths()["stdlib"])
    code = [path.read_bytes() for path in sorted(home.glob("*.py")) + sorted(home.glob("*/*.py")) if "test" not in path.parts[-2]]
    documents, total = [], 0
    for at in range(max(len(english), len(code))):
        for source in (english, code):
            if at < len(source) and total < size:
                documents.append(source[at] + b"\n\n")
                total += len(source[at])
    return corpus("Python's documentation and standard library", documents)


def read_text(path: Path, needed: int) -> Corpus:
    """A UTF-8 text file with at least `needed` bytes; RegardError for what is missing, empty, too small or binary."""
    if not path.exists():
        raise RegardError(f"text file {path} does not exist")
    if not path.is_file():
        raise RegardError(f"text {path} is not a file; expected a UTF-8 text file")
    try:
        raw = path.read_bytes()
    except OSError as why:
        raise RegardError(f"text file {path} cannot be read: {why.strerror}") from None
    if not raw:
        raise RegardError(f"text file {path} is empty")
    try:
        binary = "\0" in raw.decode("utf-8")
    except UnicodeDecodeError:
        binary = True
    if binary:
        raise RegardError(f"text file {path} is binary; expected UTF-8 text")
    if len(raw) < needed:
        raise RegardError(f"text file {path} has {len(raw)} bytes; expected at least {needed} for this --seq-len")
    return corpus(path.name, [raw])
