"""Looking into attention: `with regard.taps(model, points) as seen` reads named points of every attention call, `regard.taps.edit` changes them."""

import sys
from types import ModuleType
from typing import Any

from .fitting import fit_to_heads
from .plan import TapPlan, plan
from .points import POINTS, At
from .reductions import Behind, ColumnMass, Entropy, Mass, MeanDistance, Pooled, Reduction, Rows, Top
from .seen import Seen
from .session import Taps, edit, read
from .site import Site
from .sites import sites

__all__ = [
    "POINTS",
    "At",
    "Behind",
    "ColumnMass",
    "Entropy",
    "Mass",
    "MeanDistance",
    "Pooled",
    "Reduction",
    "Rows",
    "Seen",
    "Site",
    "TapPlan",
    "Taps",
    "Top",
    "edit",
    "fit_to_heads",
    "plan",
    "read",
    "sites",
]


class Callable(ModuleType):
    """A module that is `read` when it is called."""

    def __call__(self, *args: Any, **options: Any) -> Taps:
        return read(*args, **options)


sys.modules[__name__].__class__ = Callable
