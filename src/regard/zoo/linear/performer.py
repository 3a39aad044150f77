"""Performer: softmax attention estimated by positive orthogonal random features, FAVOR+ (id 18; Choromanski et al., 2020).

phi(x) = m^(-1/2) exp(-|x|^2/2) [exp(w_1.x), ..., exp(w_m.x)],  E[phi(q).phi(k)] = exp(q.k),  q and k scaled by D^(-1/4)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import FeatureMap, Recurrent, bind, favor
from regard.algebra.feature_map import generalized, orthogonal_gaussian
from regard.algebra.part import Sizes
from regard.algebra.readouts import smoothed
from regard.catalog.registry import register
from regard.errors import RegardError

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
    sum_eps: float = 1e-6,
    normalize: bool = False,
) -> Recurrent:
    """features: m, about D log D. kernel: "softmax" (FAVOR+), or "relu", "exp", "gelu", "softplus" for generalized attention f(Wx) + eps.
    eps: added to every feature (1e-4; 1e-3 in the generalized form). stabilize: see `regard.algebra.favor`; under a causal mask keys are
    shifted by the input `key_shift` (B, H), 0 by default (the released code takes the maximum over all keys, later ones included). sum_eps:
    added to the sum of key features in a causal call; nothing is in both directions. normalize: q and k times D^(-1/4) in the generalized form
    too. causal=False refuses causal masks. The input
    `projection` (m, D) replaces the draw of `seed`; `redraw` makes new ones."""
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
        base = favor(features, orthogonal=orthogonal, seed=seed, regularised=regularised, stabilize=False)
        function = bind(generalized, function=KERNELS[kernel], eps=1e-3 if eps is None else eps)
        feature = FeatureMap(function, inputs=base.inputs, pre=-0.25 if normalize else 0.0, causal=causal)
    else:
        raise RegardError(f"kernel={kernel!r}; expected softmax, {', '.join(KERNELS)}")
    return Recurrent(feature, readout=bind(smoothed, eps=sum_eps), scaled=False)


def redraw(head_dim: int, features: int, seed: int, **options: bool) -> Tensor:
    """A fresh projection (features, head_dim) for the input `projection`; the paper redraws about every 1000 steps."""
    sizes = Sizes(1, 1, 1, 1, 1, head_dim, head_dim)
    return orthogonal_gaussian(sizes, features, seed=seed, **options)
