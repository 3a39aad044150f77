"""Performer: softmax attention estimated by positive orthogonal random features, FAVOR+ (id 18; Choromanski et al., 2020).

phi(x) = m^(-1/2) exp(-|x|^2/2) [exp(w_1.x), ..., exp(w_m.x)],  E[phi(q).phi(k)] = exp(q.k),  q and k scaled by D^(-1/4)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...algebra import FeatureMap, Recurrent, bind, favor
from ...algebra.feature_map import generalized, orthogonal_gaussian
from ...algebra.part import Sizes
from ...catalog.registry import register
from ...errors import RegardError

KERNELS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "exp": torch.exp, "gelu": F.gelu, "softplus": F.softplus}


@register("performer")
def performer(
    features: int = 256,
    kernel: str = "softmax",
    orthogonal: bool = True,
    hyperbolic: bool = False,
    regularised: bool = False,
    stabilize: bool = True,
    causal: bool = True,
    eps: float | None = None,
    seed: int = 0,
) -> Recurrent:
    """features: m, about D log D. kernel: "softmax" (FAVOR+), or "relu", "exp", "gelu", "softplus" for generalized attention
    f(Wx) + eps. causal=False also subtracts the maximum over keys, as the paper does without a mask. The input `projection`
    (m, D) replaces the draw of `seed`; `redraw` makes new ones."""
    if kernel == "softmax":
        feature = favor(
            features,
            eps=1e-4 if eps is None else eps,
            orthogonal=orthogonal,
            hyperbolic=hyperbolic,
            stabilize=stabilize,
            seed=seed,
            causal=causal,
            regularised=regularised,
        )
    elif kernel in KERNELS:
        base = favor(features, orthogonal=orthogonal, seed=seed, regularised=regularised)
        feature = FeatureMap(bind(generalized, function=KERNELS[kernel], eps=1e-3 if eps is None else eps), inputs=base.inputs)
    else:
        raise RegardError(f"kernel={kernel!r}; expected softmax, {', '.join(KERNELS)}")
    return Recurrent(feature, readout="sum", scaled=False)


def redraw(head_dim: int, features: int, seed: int, **options: bool) -> Tensor:
    """A fresh projection (features, head_dim) for the input `projection`; the paper redraws about every 1000 steps."""
    sizes = Sizes(1, 1, 1, 1, 1, head_dim, head_dim)
    return orthogonal_gaussian(sizes, features, seed=seed, **options)
