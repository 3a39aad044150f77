"""Reading models through taps: scores and masks of heads, attribution, patching, circuits."""

from typing import Any

from ..lazy import listed, load

# Rows of the zoo under their public names, each loaded when it is first asked for.
ROWS = {
    "blank_out": "analysis.rollout_and_flow",
    "flow": "analysis.rollout_and_flow",
    "input_gradients": "analysis.rollout_and_flow",
    "rank_correlation": "analysis.rollout_and_flow",
    "rollout": "analysis.rollout_and_flow",
}

__all__ = [*ROWS]


def __getattr__(name: str) -> Any:
    return load(__name__, ROWS, name)


def __dir__() -> list[str]:
    return listed(globals(), ROWS)
