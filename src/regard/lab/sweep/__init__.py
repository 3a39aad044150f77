"""Quality against density: training-free sparse mechanisms in a pretrained model, beside an oracle and a random choice."""

from .measure import Config, Point, Sweep, sweep
from .methods import DEFAULT, method, oracle, random_blocks
from .reader import Bytes, Tokens, model_and_reader
from .report import table, write

__all__ = [
    "Bytes",
    "Config",
    "DEFAULT",
    "Point",
    "Sweep",
    "Tokens",
    "method",
    "oracle",
    "random_blocks",
    "model_and_reader",
    "sweep",
    "table",
    "write",
]
