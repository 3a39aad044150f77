"""MambaOut: the gated block and a net."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.vision.mambaout import GatedCNNBlock, MambaOut


@case("b0", "b1")
def block(g: Vectors) -> None:
    made = GatedCNNBlock(g["dim"], g.get("ratio", 8 / 3), g.get("kernel", 7), g.get("conv_ratio", 1.0)).to(g.dtype)
    g.layer(made, **g.fill(made, ("first", "fc1"), ("last", "fc2")))


@case("v0")
def net(g: Vectors) -> None:
    made = MambaOut(g["dims"], g["depths"], classes=g["classes"], kernel=g["kernel"], conv_ratio=g["conv_ratio"]).to(g.dtype)
    names = [(r"layers\.0\.(conv|norm)s\.0", r"downsample_layers.0.\g<1>1"), (r"layers\.0\.(conv|norm)s\.1", r"downsample_layers.0.\g<1>2")]
    names += [(r"^layers\.1", "stages.0.0"), (r"^layers\.2\.(conv|norm)s\.0", r"downsample_layers.1.\1"), (r"^layers\.3", "stages.1.0")]
    names += [("first", "fc1"), ("last", "fc2"), (r"head\.0", "head.fc1"), (r"head\.2", "head.norm"), (r"head\.4", "head.fc2")]
    g.layer(made, **g.fill(made, *names))
