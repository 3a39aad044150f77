"""`regard generate`: a prompt continued by a model, shown as it comes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import RegardError
from ..generate import DraftModel, generate
from ..generate.strategies import made
from .sweep.reader import Reader, model_and_reader


class Printer:
    """Shows text as its tokens come, and no character before all its bytes are there."""

    def __init__(self, reader: Reader, show: Callable[[str], None]):
        self.reader, self.show = reader, show
        self.ids: list[int] = []
        self.shown = 0

    def __call__(self, row: int, tokens: list[int]) -> None:
        self.ids += tokens
        text = self.reader.text(self.ids)
        if not text.endswith("\ufffd"):
            self.show(text[self.shown :])
            self.shown = len(text)


def speak(
    name: str,
    prompt: str,
    strategy: str = "prompt-lookup",
    draft: str | None = None,
    tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    show: Callable[[str], None] = lambda text: None,
) -> str:
    """Continue `prompt`; new text goes to `show` as it comes. Returns a line of statistics."""
    how = None if draft is not None else made(strategy)
    model, reader = model_and_reader(name)
    ids = ([] if reader.begin is None else [reader.begin]) + reader.tokens(prompt.encode())
    if not ids:
        raise RegardError("--prompt is empty; expected some text")
    if how is None:
        how = DraftModel(model_and_reader(str(draft))[0], temperature=temperature)
    out = generate(
        model,
        torch.tensor([ids]),
        how,
        max_new_tokens=tokens,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
        stream=Printer(reader, show),
    )
    new = sum(int(count) for count in out.counts)
    return f"{new} tokens in {out.steps} passes ({out.tokens_per_step:.2f} a pass), {out.seconds:.2f} s, {new / out.seconds:.1f} tokens/s"
