"""FLatten: the vision layer, with a smaller grid of keys, and the feature map."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

import regard
from regard.nn.images.grid import Dress


@case("c0", "c1", "c2", "c3")
def layer(g: Vectors) -> None:
    dress, ratio = Dress(local=g["kernel_size"], shared=True, key_position=True), g.get("sr_ratio", 1)
    made = regard.nn.GridAttention(
        g["dim"], g["heads"], (g["H"], g["W"]), "flatten", dress=dress, qkv_bias=g["kind"] == "swin", sr_ratio=ratio,
        power=float(g["focusing_factor"]),
    ).to(g.dtype)  # fmt: skip
    weight = g("qkv.weight") if g["kind"] == "swin" else torch.cat((g("q.weight"), g("kv.weight")))
    names = {"qkv.weight": weight, "out": "proj", "local": "dwc", "key_position": "positional_encoding"}
    g.load(made, names | ({"reduce.conv": "sr", "reduce.norm": "norm"} if ratio > 1 else {}))
    if g["kind"] == "swin":
        g.put(made.qkv.bias, "qkv.bias")
    g.put(made.inputs.learned["sharpness"], g("scale").view(g["heads"], -1))
    g.layer(made)


@case("map")
def feature_map(g: Vectors) -> None:
    for power in (1, 3, 8):
        feature, env = regard.get("flatten", power=float(power)).feature, {"sharpness": g("scale")}
        g.same(feature(g("x")[None, None], g("x")[None, None], env, env)[0][0, 0], f"focused_p{power}")
