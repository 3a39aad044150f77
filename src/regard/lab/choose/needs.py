"""What somebody needs, checked before anything is measured."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...errors import RegardError
from ..compare.study import MEASURES

SIZES = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}


def amount(text: str, what: str) -> int:
    """A count with a letter: "32k", "1GB", "512MiB", "4096"; letters stand for powers of 1024."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:i?b)?\s*", str(text).lower())
    if found is None or not (size := int(float(found[1]) * SIZES[found[2]])):
        raise RegardError(f"{what} {text!r}: expected a number above 0 such as 4096, 32k or 1GB")
    return size


@dataclass(frozen=True)
class Needs:
    """context: tokens of a prompt; answer: tokens made after it; memory: bytes for what is kept of all layers and sequences and for the
    workspace of one layer (weights are not counted); the model's shape: dim, layers, heads, batch; minutes: for measuring costs."""

    context: int
    task: str = "text"
    memory: int | None = None
    device: str = "cpu"
    answer: int = 256
    dim: int = 512
    layers: int = 12
    heads: int = 8
    batch: int = 1
    minutes: float = 2.0
    among: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.task not in MEASURES:
            raise RegardError(f"--task {self.task!r}: expected one of {', '.join(MEASURES)}")
        for name, most in (("context", 2**30), ("answer", 2**20), ("dim", 2**16), ("layers", 1000), ("heads", 1024), ("batch", 2**16)):
            if not 1 <= getattr(self, name) <= most:
                raise RegardError(f"--{name} {getattr(self, name)}: expected between 1 and {most}")
        if self.dim % self.heads or self.dim // self.heads % 2:
            raise RegardError(f"--heads {self.heads}: expected a divisor of --dim {self.dim} that leaves an even number of channels a head")
        if not 0 < self.minutes <= 10_000:
            raise RegardError(f"--minutes {self.minutes:g}: expected a positive number up to 10000")
        if self.memory is not None and self.memory < 1:
            raise RegardError(f"--memory {self.memory}: expected at least one byte")
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as why:
            raise RegardError(f"--device {self.device!r}: this PyTorch cannot use it ({str(why).splitlines()[0]})") from None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
