"""The Routing Transformer's layer: some heads route through clusters, the others look through a local window (Roy et al., 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..algebra import Causal, Window
from ..catalog import get
from ..engine import attend
from ..errors import RegardError
from ..mechanisms.selected.routing import commitment_loss, update_centroids


class RoutingAttention(nn.Module):
    """x (B, L, dim) -> (y (B, L, dim), commitment loss). Centroids are buffers, moved by an average of assigned tokens in training.

    routed: how many of the heads route (None: half). clusters, members: k and w. window: of the local heads. decay: of the average.
    In causal use queries serve as keys; which tokens share a cluster is decided over the whole sequence.
    """

    centroids: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        clusters: int,
        *,
        members: int | None = None,
        routed: int | None = None,
        window: int = 256,
        causal: bool = True,
        decay: float = 0.999,
        commitment: float = 1e-4,
    ):
        super().__init__()
        self.heads, self.routed = heads, heads // 2 if routed is None else routed
        if not 0 < self.routed <= heads:
            raise RegardError(f"routed={self.routed}: expected between 1 and heads={heads}")
        self.window, self.causal, self.decay, self.commitment = window, causal, decay, commitment
        self.qkv, self.out = nn.Linear(dim, 3 * dim, False), nn.Linear(dim, dim, False)
        self.mechanism = get("routing-transformer", clusters=clusters, members=members, shared=causal)
        self.register_buffer("centroids", nn.functional.normalize(torch.randn(self.routed, clusters, dim // heads), dim=-1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask, split = (Causal() if self.causal else None), self.routed
        far_q, far_k = q[:, :split], q[:, :split] if self.causal else k[:, :split]
        out = [attend(far_q, far_k, v[:, :split], self.mechanism, mask=mask, centroids=self.centroids)]
        if split < self.heads:
            near = Causal() & Window(self.window) if self.causal else Window(self.window)
            out.append(attend(q[:, split:], k[:, split:], v[:, split:], "softmax", mask=near))
        loss = commitment_loss(self.centroids, far_q, self.commitment)
        if self.training:
            self.centroids.copy_(update_centroids(self.centroids, far_q.detach(), far_k.detach(), self.decay))
        return self.out(torch.cat(out, 1).transpose(1, 2).flatten(-2)), loss
