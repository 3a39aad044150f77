"""The sparse attention that a correction or a permutation stands around."""

from __future__ import annotations

from regard.algebra import Causal, Sinks, Weighted, Window

SPARSE = Weighted(mask=Causal() & (Window(64) | Sinks(4)))
