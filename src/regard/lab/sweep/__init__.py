"""Quality against density: training-free sparse mechanisms in a pretrained model, beside an oracle and a random choice."""

from .measure import Config, Point, Sweep, sweep
from .methods import DEFAULT, method, oracle, random_blocks
from .reader import Bytes, Tokens, model_and_reader
from .report import table, write, write_points

__all__ = [
    "DEFAULT",
    "Bytes",
    "Config",
    "Point",
    "Sweep",
    "Tokens",
    "method",
    "model_and_reader",
    "oracle",
    "random_blocks",
    "sweep",
    "table",
    "write",
    "write_points",
]
