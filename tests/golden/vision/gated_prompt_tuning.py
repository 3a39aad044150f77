"""Gated prompt tuning, and the baselines, on a small ViT."""

from __future__ import annotations

import numpy as np
from golden.vectors import Vectors, case

from regard.nn.images.timm_host import load
from regard.zoo.vision.gated_prompt_tuning import GatedPromptTuner


@case("c0", "c1", "c2", "c3", float32=1e-3)
def features(g: Vectors) -> None:
    vit = load("timm").models.VisionTransformer(
        img_size=(8, 12), patch_size=4, embed_dim=4, depth=g["depth"], num_heads=2, mlp_ratio=1, num_classes=0
    )
    made = GatedPromptTuner(vit, 2, kind=g["kind"], temperature=g["temperature"], pool=g["pool"]).to(g.dtype)
    if g["kind"] == "deep":
        for name in ("", "grad_"):
            first, rest = (g.arrays[g.key(f"{name}{part}") or ""] for part in ("prompt_embeddings", "deep_prompt_embeddings"))
            g.arrays[f"{name}prompts_{g.config}"] = np.concatenate((first, rest))
    names = [(r"^vit\.", ""), ("^prompts", "prompts" if g["kind"] == "deep" else "prompt_embeddings"), ("^gates", "gate_logit")]
    g.layer(made.features, **g.fill(made, *names, ("^temperatures", "temp")))
