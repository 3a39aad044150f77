"""SinkLoRA's released groups, which are LongLoRA's: no sinks, and shifted heads turned around."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.systems.sinklora import sf_attention


@case("c0", "c1", "c2")
def groups(g: Vectors) -> None:
    g.op(lambda q, k, v: sf_attention(q, k, v, n_sink=0, restore=0.0))
