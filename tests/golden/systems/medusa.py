"""Medusa: the tree of 63 nodes, and typical acceptance."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

from regard.generate.accept import Typical
from regard.generate.tree import Draft, ancestors
from regard.zoo.systems.medusa import MC_SIM_7B_63


@case("b0", dtypes=(torch.float64,))
def tree(g: Vectors) -> None:
    seen = ancestors(MC_SIM_7B_63.parents[None])[0]
    g.same(seen.to(torch.uint8), "out", 0.0)
    g.same((seen.sum(-1) - 1).to(torch.uint8), "depth", 0.0)


@case("t0", "t1", "t2", "t3", "t4")
def acceptance(g: Vectors) -> None:
    draft = Draft(g("tokens")[None], g("parents")[None])
    node, _ = Typical(g["temperature"], g["eps"], g["delta"])(draft, g("logits")[None])
    g.same(node, "out", 0.0)
    found = int(draft.depths[0, node])
    assert found == g["accepted"], f"{found} guesses stay, {g['accepted']} of the official code's"
