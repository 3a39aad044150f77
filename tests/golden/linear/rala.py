"""RALA: the core with and without rotary positions, and the vision layer."""

from __future__ import annotations

from golden.linear.mala import both
from golden.vectors import Vectors, case


@case("f0", "f1", "c0", "c1")
def attention(g: Vectors) -> None:
    both(g, "rala")
