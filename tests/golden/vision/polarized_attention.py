"""Polarized self-attention, the released forms."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.vision.polarized_attention import PolarizedSelfAttention

NAMES = (("q_plane", "conv_q_right"), ("v_plane", "conv_v_right"), ("q_channel", "conv_q_left"), ("v_channel", "conv_v_left"))


@case("p0", "p1", "s0", "s1")
def layer(g: Vectors) -> None:
    made = PolarizedSelfAttention(g["channels"], g["layout"], released=True).to(g.dtype)
    g.layer(made, **g.fill(made, *NAMES, ("^up", "conv_up")))
