"""Secondary sinks: which tokens are sink-like at which layers, and of which kind."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

from regard.zoo.analysis.secondary_attention_sinks import detect_sinks

KINDS = {"primary": 1, "secondary": 2, "noise": 3}


@case("c0", "c1", "c2")
def sinks(g: Vectors) -> None:
    """Without the window the released map leaves the first token out."""
    states = g("states")
    table, kinds = torch.zeros(states.shape[2], len(states)), torch.zeros(states.shape[2])
    for sink in detect_sinks(states, clip=g["clip"])[0]:
        if sink.position or g["clip"]:
            table[sink.position, list(sink.layers)] = 1
            kinds[sink.position] = KINDS[sink.kind]
    g.same(table, "out", 0.0)
    g.same(kinds, "kinds", 0.0)
