"""TCPA: which prompts each token sees, and the matching loss."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.nn.images.timm_host import load
from regard.zoo.vision.tcpa import TCPA


@case("c0", "c1")
def matching(g: Vectors) -> None:
    vit = load("timm").models.VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=0)
    made = TCPA(vit, 2, g["own"], g["shared"]).to(g.dtype)
    g.fill(made, (r"^own", "Pool_cls"), (r"^shared", "Pool_image"), without="vit|head")
    x = g.leaf("x")
    seen, loss = made.visible(x, 1)
    g.same(loss, "out")
    g.same(seen.long(), "mask", 0.0)
    g.gradients(g.weigh(loss), {"x": x})
