"""The block whose attention is faded out."""

from __future__ import annotations

from functools import partial

from golden.vectors import Vectors, case
from torch import nn

from regard.nn.images.timm_host import load
from regard.zoo.vision.lambda_vit import DilutedBlock


@case("c0", "c1", "c2")
def block(g: Vectors) -> None:
    layers = load("timm").models.vision_transformer
    made = DilutedBlock(layers.Block(4, 2, 2.0, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))).to(g.dtype)
    made.lam = g["lam"]
    g.layer(made, **g.fill(made, (r"^block\.", "")))
