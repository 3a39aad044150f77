"""Routing Transformer: content-based clusters by online spherical k-means (id 162; Roy et al., 2020).

    cluster c takes its w nearest queries and keys; o = softmax(q k^T / sqrt(D)) v inside it; mean over a token's clusters
The layer with local heads and centroids that follow the data: `regard.nn.RoutingAttention`.
"""

import torch
from torch import Tensor

from ...algebra import Clustered, Input, Learned, Sizes, bind
from ...catalog.registry import register
from ...engine.composed import unit


def random_units(sizes: Sizes, clusters: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(sizes.heads, clusters, sizes.head_dim), dim=-1)


@register("routing-transformer")
def routing(
    clusters: int = 8, members: int | None = None, shared: bool = False, unit_length: bool = True, scaled: bool = True
) -> Clustered:
    """clusters: k, about sqrt(n). members: w a cluster (None: ceil(n / k)). shared: keys are the queries, and a token sees itself only
    when it would see nothing else (the causal form). unit_length=False, scaled=False: as the released TensorFlow code.
    Input `centroids` (H, k, D)."""
    spec = Input("centroids", "hfd", layer=Learned(bind(random_units, clusters=clusters), trainable=False))
    return Clustered(clusters=clusters, members=members, shared=shared, unit=unit_length, scaled=scaled, inputs=(spec,))


@torch.no_grad()
def update_centroids(centroids: Tensor, q: Tensor, k: Tensor, decay: float = 0.999) -> Tensor:
    """mu_c <- decay mu_c + (1 - decay)/2 (sum of queries + sum of keys assigned to c by argmax), renormalised; empty clusters stay.

    centroids (H, k, D) of unit length; q, k (B, H, L, D) as they enter the mechanism.
    """
    moved, touched = decay * centroids, torch.zeros(centroids.shape[:2], dtype=torch.bool, device=centroids.device)
    for x in (unit(q), unit(k)):
        nearest = torch.nn.functional.one_hot((x @ centroids.transpose(-1, -2)).argmax(-1), centroids.shape[1]).to(x.dtype)
        moved = moved + (1 - decay) / 2 * torch.einsum("bhlc,bhld->hcd", nearest, x)
        touched |= nearest.sum((0, 2)) > 0
    return torch.where(touched[..., None], torch.nn.functional.normalize(moved, dim=-1), centroids)


def commitment_loss(centroids: Tensor, x: Tensor, weight: float = 1e-4) -> Tensor:
    """weight * mean squared distance of unit tokens x (B, H, L, D) to the centroid nearest to each."""
    x = unit(x)
    nearest = (x.detach() @ centroids.transpose(-1, -2)).argmax(-1)
    heads = torch.arange(centroids.shape[0], device=x.device)[:, None]
    return weight * (x - centroids[heads, nearest]).square().mean()
