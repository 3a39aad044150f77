"""What a comparison is told, checked before anything is computed or written."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ...catalog import get
from ...errors import RegardError
from ...nn.mixers import mixer, mixer_names, parsed
from ..files import prepare

LENGTHS = (1024, 2048, 4096, 8192, 16384)
BASELINE = "softmax"
BACKENDS = ("loky", "ray", "dask")


def default_mechanisms() -> tuple[str, ...]:
    """Two weighted, three recurrent and a selected mechanism; MoBA's blocks are cut to the short training length."""
    return ("softmax", "softpick", "gla", "deltanet", "moba:block_size=32,top_k=2", "hedgehog")


@dataclass(frozen=True)
class Config:
    """A comparison. mechanisms: names, with hyperparameters as "name:key=value,key=value". minutes: the budget of all of it.

    seed: of the first run; up to `seeds` runs, each with the next seed, as the budget allows. parallel: how many runs at once, each on one
    thread (None: as many as there are cores). backend: joblib's, "loky" (processes here), "ray" or "dask".
    """

    mechanisms: tuple[str, ...]
    text: Path | None = None
    minutes: float = 4.0
    seq_len: int = 128
    out: Path = Path("runs/compare")
    seed: int = 0
    dim: int = 64
    layers: int = 2
    heads: int = 2
    batch: int = 8
    lengths: tuple[int, ...] = LENGTHS
    seeds: int = 3
    parallel: int | None = None
    backend: str = "loky"

    def __post_init__(self) -> None:
        if not self.mechanisms:
            raise RegardError("no mechanism given; name at least one (see `regard list --status works`)")
        if len(set(self.mechanisms)) < len(self.mechanisms):
            twice = next(name for name in self.mechanisms if self.mechanisms.count(name) > 1)
            raise RegardError(f"mechanism {twice!r} is given twice; name each once (hyperparameters make names differ: name:key=value)")
        if not (math.isfinite(self.minutes) and 0 < self.minutes <= 10_000):
            raise RegardError(f"--minutes {self.minutes:g}: expected a positive number up to 10000")
        if not 16 <= self.seq_len <= 8192:
            raise RegardError(f"--seq-len {self.seq_len}: expected between 16 and 8192")
        if not 0 <= self.seed < 2**32:
            raise RegardError(f"--seed {self.seed}: expected between 0 and 4294967295")
        if not 1 <= self.seeds <= 100:
            raise RegardError(f"--seeds {self.seeds}: expected between 1 and 100")
        for name, most in (("dim", 2**16), ("layers", 1000), ("heads", 1024), ("batch", 2**16)):
            if not 1 <= getattr(self, name) <= most:
                raise RegardError(f"--{name} {getattr(self, name)}: expected between 1 and {most}")
        if self.dim % self.heads or self.dim // self.heads % 2:
            raise RegardError(f"--heads {self.heads}: expected a divisor of --dim {self.dim} that leaves an even number of channels a head")
        if self.parallel is not None and not 1 <= self.parallel <= 1024:
            raise RegardError(f"--parallel {self.parallel}: expected between 1 and 1024")
        if self.backend not in BACKENDS:
            raise RegardError(f"--backend {self.backend}: expected one of {', '.join(BACKENDS)}")
        for name in self.mechanisms:
            plain, options = parsed(name)
            if plain in mixer_names():
                mixer(plain, self.dim, self.heads, **options)  # says what is wrong with the hyperparameters
                continue
            mechanism = get(plain, **options)
            if not (mechanism.can_be_causal or mechanism.causal_only):
                raise RegardError(f"mechanism {name!r} reads the whole sequence at once, so it cannot be trained as a language model")

    @property
    def needed_bytes(self) -> int:
        """Bytes of text below which held-out windows of 4x the training length do not fit."""
        return 50 * self.seq_len

    def prepare_out(self) -> None:
        """Make the output directory; RegardError if nothing can be written there."""
        prepare(self.out, f"--out {self.out}")

    def as_dict(self) -> dict[str, Any]:
        shown = asdict(self)
        shown |= {"text": None if self.text is None else str(self.text), "out": str(self.out)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in shown.items()}


def layer_of(spec: str, dim: int, heads: int, **options: Any) -> nn.Module:
    """A token mixer of "name:key=value,..."."""
    name, own = parsed(spec)
    return mixer(name, dim, heads, **options, **own)
