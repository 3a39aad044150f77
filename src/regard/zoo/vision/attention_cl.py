"""Attention-CL: clips pooled by how much each frame shows, trained with mined pairs weighed by class vectors (id 40; Pathak et al., 2019).

s_t = relu(conv1d_3(relu(conv_{h x w}(x_t)))), alpha = softmax_t(s), f = sum_t alpha_t mean_hw(x_t)
OSM-CAA, on unit features, d_ij their distance: W_ij = S_ij min(a_i, a_j), S = exp(-d^2 / sigma^2) of positives, max(alpha - d, 0) of negatives,
a_i = softmax_k(x_i . c_k)[y_i], c the classifier's unit columns, or in the CL form the centres
L_P = 1/2 sum W d^2 / sum W over positives,  L_N = 1/2 sum W max(alpha - d, 0)^2 / sum W over negatives,  L = (1 - l) L_P + l L_N
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.parts import takes
from regard.nn.retrieval import CentreLoss, triplet_batch_hard


@register("attention-cl", kind="module")
class TemporalAttentionPool(nn.Module):
    """Maps of frames x (B, T, C, h, w) -> (clips (B, C), weights (B, T)). spatial: (h, w). weights: "softmax", or "sigmoid" over their sum.
    kaiming: the released first values of its convolutions (normal, fan in, biases 0)."""

    def __init__(
        self, channels: int, hidden: int = 256, spatial: tuple[int, int] = (14, 7), weights: str = "softmax", kaiming: bool = True
    ):
        super().__init__()
        if weights not in ("softmax", "sigmoid"):
            raise RegardError(f"weights={weights!r}; expected 'softmax' or 'sigmoid'")
        self.channels, self.kind, (self.height, self.width) = channels, weights, spatial
        self.conv, self.over_time = nn.Conv2d(channels, hidden, spatial), nn.Conv1d(hidden, 1, 3, padding=1)
        for layer in (self.conv, self.over_time) if kaiming else ():
            nn.init.kaiming_normal_(layer.weight, mode="fan_in")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    @takes(x="batch frames channels height width")
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] == 0:
            raise RegardError("x has no frames; expected one at least")
        seen = torch.relu(self.conv(x.flatten(0, 1))).flatten(1).unflatten(0, x.shape[:2])
        scores = torch.relu(self.over_time(seen.mT))[:, 0]
        weights = scores.softmax(1) if self.kind == "softmax" else F.normalize(scores.sigmoid(), p=1.0, dim=1)
        return (weights[..., None] * x.mean((3, 4))).sum(1), weights


class OSMCAALoss(nn.Module):
    """features (n, C), labels (n,), vectors (C, K) -> the loss: online soft mining with class-aware attention. Without a positive pair its part
    is 0, and so of negatives. vectors: the classifier's weight transposed, or centres transposed (CL)."""

    def __init__(self, alpha: float = 1.2, share: float = 0.5, sigma: float = 0.8):
        super().__init__()
        self.alpha, self.share, self.sigma = alpha, share, sigma

    def forward(self, features: Tensor, labels: Tensor, vectors: Tensor) -> Tensor:
        if vectors.dim() != 2 or vectors.shape[0] != features.shape[1] or int(labels.max()) >= vectors.shape[1]:
            raise RegardError(f"vectors {tuple(vectors.shape)}; expected (channels={features.shape[1]}, classes above {int(labels.max())})")
        x = F.normalize(features, dim=1)
        square = x.square().sum(1)
        d = (square[:, None] + square - 2 * x @ x.T).clamp_min(1e-12).sqrt()
        same = labels[:, None] == labels
        slack = (self.alpha - d).clamp_min(1e-12)
        mined = torch.where(same, torch.exp(-d.square() / self.sigma**2), slack)
        own = torch.softmax(x @ F.normalize(vectors, dim=0), 1).gather(1, labels[:, None])[:, 0]
        w = mined * torch.minimum(own[:, None], own)
        positive = w * (same & ~torch.eye(len(x), dtype=torch.bool, device=x.device))
        negative = w * ~same
        parts = [(p * e.square()).sum() / torch.where(p.sum() > 0, p.sum(), 1.0) / 2 for p, e in ((positive, d), (negative, slack))]
        return (1 - self.share) * parts[0] + self.share * parts[1]


class ClipReID(nn.Module):
    """Tracks (B, T, colours, H, W) -> (features (B, dim), logits (B, classes) of their BatchNorm, whose bias stays 0, weights (B, T)).

    base: images -> maps (., dim, h, w). pool: None for the mean over frames."""

    def __init__(self, base: nn.Module, dim: int, classes: int, pool: TemporalAttentionPool | None):
        super().__init__()
        self.base, self.pool = base, pool
        self.neck, self.classifier = nn.BatchNorm1d(dim), nn.Linear(dim, classes, bias=False)
        self.neck.bias.requires_grad_(False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.base(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        if self.pool is None:
            features, weights = maps.mean((1, 3, 4)), x.new_full(x.shape[:2], 1 / x.shape[1])
        else:
            features, weights = self.pool(maps)
        normed = self.neck(features)
        return normed, self.classifier(normed), weights


def attention_cl_loss(
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    centres: CentreLoss,
    vectors: Tensor,
    mining: OSMCAALoss,
    beta: float = 0.5,
    centre_weight: float = 5e-4,
    smoothing: float = 0.1,
    margin: float = 0.3,
) -> Tensor:
    """CE(smoothed labels) + (1 - beta) triplet + centre_weight centre + beta OSM-CAA."""
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing) + (1 - beta) * triplet_batch_hard(features, labels, margin)
    return loss + centre_weight * centres(features, labels) + beta * mining(features, labels, vectors)
