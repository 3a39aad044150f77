"""Facts hidden in text and asked for later: what the tiny model was taught, and what retrieval is measured with."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """`text` states that the key of `name` is `value`."""

    name: str
    value: str

    @property
    def text(self) -> bytes:
        return f"\nThe key of {self.name} is {self.value}.\n".encode()


def fact(draw: random.Random) -> Fact:
    """A name of five letters with a value of five digits."""
    name = "".join(draw.choice(string.ascii_lowercase) for _ in range(5))
    return Fact(name, "".join(draw.choice(string.digits) for _ in range(5)))


def question(name: str, value: str = "") -> bytes:
    """The text that asks for the value of `name`, and the value where it is given."""
    return f"\nThe key of {name} is {value}".encode()
