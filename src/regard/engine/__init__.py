"""How attention runs: a planner and a few executors that run any description."""

import torch

from .door import attend, attend_with_stats, plan
from .merge import merge
from .meter import Pairs, pairs_read
from .plan import Plan
from .reference import Stats
from .stream import KeyValueState, ManyStates, ScanState, State, step
from .weights import weights

# The first torch.exp of a process can lose half its digits where two threads set up MKL's vector mode at once (PyTorch 2.13, CPU:
# errors of 1e-9 in float64, in about one process of five). A small one first, on one thread, prevents that.
torch.exp(torch.zeros(4096, dtype=torch.float64))

__all__ = [
    "KeyValueState",
    "ManyStates",
    "Pairs",
    "Plan",
    "ScanState",
    "State",
    "Stats",
    "attend",
    "attend_with_stats",
    "merge",
    "pairs_read",
    "plan",
    "step",
    "weights",
]
