"""ULSAM: a softmax map over the pixels for each group of channels."""

from __future__ import annotations

import numpy as np
from golden.vectors import Vectors, case

from regard.zoo.vision.ulsam import ULSAM


@case("c0", "c1", "c2", "c3")
def layer(g: Vectors) -> None:
    """Layers a group stand side by side here."""
    for name in {
        key.removesuffix(f"_{g.config}").split(".", 2)[2] for key in g.arrays if ".0." in key and not key.endswith("batches_tracked")
    }:
        for prefix in ("", "grad_", "after_"):
            parts = [f"{prefix}subspaces.{n}.{name}" for n in range(g["groups"])]
            if g.has(*parts):
                g.arrays[f"{prefix}{name}_{g.config}"] = np.concatenate([g.arrays[g.key(part) or ""] for part in parts])
    names = (("depthwise", "conv_dws"), ("pointwise", "conv_point"), (r"after\.0\.0", "bn_dws"), (r"after\.1\.0", "bn_point"))
    made = ULSAM(g["channels"], g["groups"]).to(g.dtype)
    g.layer(made, **g.fill(made, *names))
    g.moved(made, *names)
