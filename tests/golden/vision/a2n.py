"""Attention in attention: a block, and narrow nets of each scale."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.vision.a2n import A2N, AttentionInAttention

BLOCK = (
    ("first", "conv_first"),
    ("last", "conv_last"),
    ("router", "ADM"),
    ("plain", "non_attention"),
    (r"attention\.conv_first", "attention.k1"),
)
BLOCK += ((r"attention\.mix", "attention.k2"), (r"attention\.value", "attention.k3"), (r"attention\.conv_last", "attention.k4"))


@case("b0", "b1")
def block(g: Vectors) -> None:
    made = AttentionInAttention(g["channels"], g["reduction"], g["temperature"]).to(g.dtype)
    g.layer(made, **g.fill(made, *BLOCK))


@case("n2", "n3", "n4")
def net(g: Vectors) -> None:
    made = A2N(g["scale"], 4, 4, 2).to(g.dtype)
    names = [("^close", "trunk_conv"), ("^blocks", "AAB_trunk")]
    for at in range(len(made.ups)):
        names += [(rf"^ups\.{at}\.0", f"upconv{at + 1}"), (rf"^ups\.{at}\.1", f"att{at + 1}"), (rf"^ups\.{at}\.2", f"HRconv{at + 1}")]
    g.layer(made, **g.fill(made, *names, *BLOCK))
