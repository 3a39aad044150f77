"""Losses and scores of features that are compared: triplets of the hardest, centres, rank-1 and mean average precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RegardError


def triplet_batch_hard(features: Tensor, labels: Tensor, margin: float = 0.3, cosine: bool = True) -> Tensor:
    """mean_i max(0, margin + farthest positive - nearest negative) of features (n, C), labels (n,), distances -cos or Euclidean; an image is its own
    positive. RegardError: one label alone."""
    if bool((labels == labels[0]).all()):
        raise RegardError("labels are all the same; expected two identities or more in a batch")
    if cosine:
        unit = features / features.norm(dim=1, keepdim=True)
        far = -(unit @ unit.T)
    else:
        far = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").square().clamp_min(1e-12).sqrt()
    same = labels[:, None] == labels
    positive = far.masked_fill(~same, -torch.inf).max(1).values
    negative = far.masked_fill(same, torch.inf).min(1).values
    return F.relu(margin + positive - negative).mean()


class CentreLoss(nn.Module):
    """mean_i |f_i - c_{y_i}|^2, clamped from 1e-12 to 1e12 in each term; `centres` (classes, dim) start normal. The clamp counts, as
    released, for the other classes too: a constant."""

    def __init__(self, classes: int, dim: int):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(classes, dim))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        own = (features - self.centres[labels]).square().sum(1).clamp(1e-12, 1e12)
        return own.mean() + (len(self.centres) - 1) * 1e-12

    def rescale(self, weight: float) -> None:
        """Before the centres' own step: their gradient over the weight that the loss had in the sum."""
        if self.centres.grad is not None:
            self.centres.grad.div_(weight)


@torch.no_grad()
def retrieval_scores(query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> dict[str, float]:
    """{"rank1", "map"} from 0 to 1 by cosines of features (n, C), each query among the whole gallery."""
    order = (F.normalize(query, dim=1) @ F.normalize(gallery, dim=1).T).argsort(1, descending=True)
    right = gallery_labels[order] == query_labels[:, None]
    if not bool(right.any(1).all()):
        raise RegardError("a query has no image of its label in the gallery; expected one at least")
    places = torch.arange(1, right.shape[1] + 1, device=right.device)
    precision = right.cumsum(1) / places
    average = (precision * right).sum(1) / right.sum(1)
    return {"rank1": float(right[:, 0].double().mean()), "map": float(average.double().mean())}
