"""Visual attention network: the gate, the unit, the block and a net."""

from __future__ import annotations

from golden.vectors import Vectors, case
from torch import nn

from regard.zoo.vision.van_lka import LKA, VAN, LKAAttention, VANBlock

GATE = (("near", "conv0"), ("far", "conv_spatial"), ("mix", "conv1"))
UNIT = (("first", "proj_1"), ("last", "proj_2"), ("attention", "spatial_gating_unit"), *GATE)
MLP = ((r"mlp\.0", "mlp.fc1"), (r"mlp\.1", "mlp.dwconv.dwconv"), (r"mlp\.4", "mlp.fc2"))
BLOCK = ((r"attention\.attention", "attn.spatial_gating_unit"), (r"attention\.", "attn."), ("scale", "layer_scale_"), *MLP, *UNIT)


@case("l0", "l1", "a0", "b0", "b1")
def parts(g: Vectors) -> None:
    made, names = {
        "l": lambda: (LKA(g["dim"]), GATE),
        "a": lambda: (LKAAttention(g["dim"]), UNIT),
        "b": lambda: (VANBlock(g["dim"], g["ratio"]), BLOCK),
    }[g.config[0]]()
    made = made.to(g.dtype)
    g.layer(made, **g.fill(made, *names))
    g.moved(made, *names)


@case("v0")
def net(g: Vectors) -> None:
    made = VAN(g["dims"], g["depths"], g["ratios"], classes=g["classes"]).to(g.dtype)
    names: list[tuple[str, str]] = []
    for at, stage in enumerate(made.stages):
        assert isinstance(stage, nn.Sequential)
        names += [(rf"stages\.{at}\.0", f"patch_embed{at + 1}.proj"), (rf"stages\.{at}\.1\.", f"patch_embed{at + 1}.norm.")]
        names += [(rf"stages\.{at}\.{len(stage) - 1}", f"norm{at + 1}")]
        names += [(rf"stages\.{at}\.{b + 2}", f"block{at + 1}.{b}") for b in range(len(stage) - 3)]
    g.layer(made, **g.fill(made, *names, (r"(^norm\d)\.norm", r"\1"), *BLOCK))
