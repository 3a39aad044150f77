"""Text as a model reads it: bytes, or the tokens of the tokenizer beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ... import models
from ...errors import MissingDependency, RegardError


class Reader(Protocol):
    @property
    def begin(self) -> int | None:
        """The token that every prompt starts with."""
        ...

    def tokens(self, text: bytes) -> list[int]: ...

    def size(self, ids: list[int]) -> int:
        """Bytes of text that ids stand for."""
        ...

    def text(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Bytes:
    """One token a byte."""

    begin: int | None = models.BEGIN

    def tokens(self, text: bytes) -> list[int]:
        return list(text)

    def size(self, ids: list[int]) -> int:
        return len(ids)

    def text(self, ids: list[int]) -> str:
        return bytes(x for x in ids if x != self.begin).decode(errors="replace")


@dataclass(frozen=True)
class Tokens:
    """A transformers tokenizer, without special tokens but the one that it begins texts with, if any."""

    tokenizer: Any

    @property
    def begin(self) -> int | None:
        first = self.tokenizer("a")["input_ids"][0]
        return first if first == self.tokenizer.bos_token_id else None  # type: ignore[no-any-return]

    def tokens(self, text: bytes) -> list[int]:
        return list(self.tokenizer(text.decode(errors="replace"), add_special_tokens=False)["input_ids"])

    def size(self, ids: list[int]) -> int:
        return len(self.tokenizer.decode(ids).encode())

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def model_and_reader(name: str) -> tuple[Any, Reader]:
    """A model that comes with regard, or a folder that transformers reads: a causal language model and its tokenizer."""
    if name in models.names("text"):
        model = models.load(name)
        return model, Bytes() if model.config.vocab_size == 256 else Tokens(models.tokenizer(name))
    if not (Path(name) / "config.json").is_file():
        raise RegardError(f"model {name}: expected {' or '.join(models.names('text'))}, or a folder with a model in transformers' format")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as missing:
        raise MissingDependency("models need transformers: pip install 'regard[hf]'") from missing
    try:
        model = AutoModelForCausalLM.from_pretrained(name, local_files_only=True).float().eval()
        if model.config.vocab_size == 256:
            return model, Bytes(model.config.bos_token_id)
        return model, Tokens(AutoTokenizer.from_pretrained(name, local_files_only=True))
    except (OSError, ValueError) as why:
        raise RegardError(f"model {name}: {' '.join(str(why).split())}") from None
