"""CBAM with each pooling, with and without the gate over pixels."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.vision.cbam import CBAM

NAMES = ((r"over_channels\.mlp\.0", "ChannelGate.mlp.1"), (r"over_channels\.mlp\.2", "ChannelGate.mlp.3"))
NAMES += ((r"over_pixels\.norm", "SpatialGate.spatial.bn"), (r"over_pixels\.conv", "SpatialGate.spatial.conv"))


@case("c0", "c1", "c2", "c3", "c4", "c5")
def layer(g: Vectors) -> None:
    made = CBAM(g["channels"], g["reduction"], g.get("pools", ("avg", "max")), g.get("spatial", True)).to(g.dtype)
    g.layer(made, **g.fill(made, *NAMES))
    g.moved(made, *NAMES)
