"""TransNormer's NormAttention: linear attention without a divisor, its output normalised, so that gradients stay bounded (id 93; Qin et al., 2022).

o_i = x / (|x| / sqrt(D) + eps),   x = phi(q_i) sum_j phi(k_j) v_j^T,   phi = elu + 1
"""

import torch
from torch import Tensor

from regard.algebra import FeatureMap, FixedBlock, Mechanism, Recipe, Recurrent, Weighted, bind, elu_plus_one
from regard.catalog import get
from regard.catalog.registry import register
from regard.errors import RegardError


def root_mean_square(o: Tensor, eps: float, across: bool) -> Tensor:
    dims = (-3, -1) if across else (-1,)
    square = o.square().mean(dims, keepdim=True)
    # A row that saw nothing is zero, and so is its gradient: the root has no slope there.
    return o / (torch.where(square > 0, square, 1.0).sqrt() * (square > 0) + eps)


@register("transnormer")
def transnormer(norm: str = "head", eps: float = 1e-6) -> Recurrent:
    """norm: over the channels of each "head" or of "all" heads together. Both directions, or causal. `transnormer_layers` puts attention
    inside blocks before it, as the model does."""
    if norm not in ("head", "all"):
        raise RegardError(f"norm={norm!r}; expected head or all")
    readout = bind(root_mean_square, eps=eps, across=norm == "all")
    return Recurrent(FeatureMap(elu_plus_one), readout=readout, scaled=False, recipe=Recipe(rope=False))


def diagonal(block_size: int = 64, kind: str = "softmax") -> Mechanism:
    """DiagAttention: attention inside blocks of block_size, by "softmax" or "rela" (its layer normalises the output)."""
    if kind == "softmax":
        return Weighted(mask=FixedBlock(block_size))
    from dataclasses import replace

    rela = get("rela")
    assert isinstance(rela, Weighted)
    return replace(rela, mask=FixedBlock(block_size))


def transnormer_layers(layers: int, kind: str = "T2", block_size: int = 64) -> list[Mechanism]:
    """One mechanism a layer for `regard.nn.Decoder`: DiagAttention in the first half, NormAttention in the second. kind: "T1": ReLA
    blocks, "T2": softmax blocks."""
    if kind not in ("T1", "T2"):
        raise RegardError(f"kind={kind!r}; expected T1 or T2")
    early = diagonal(block_size, "rela" if kind == "T1" else "softmax")
    return [early if layer < layers // 2 else transnormer() for layer in range(layers)]
