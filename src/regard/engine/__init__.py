"""How attention runs: a planner and a few executors that run any description."""

from .door import attend, attend_with_stats, names_resolver, plan
from .merge import merge
from .plan import Plan
from .reference import Stats
from .weights import weights
from .stream import KeyValueState, ManyStates, ScanState, State, step

__all__ = ["KeyValueState", "ManyStates", "Plan", "ScanState", "State", "Stats", "attend", "attend_with_stats", "merge", "names_resolver", "plan", "step", "weights"]
