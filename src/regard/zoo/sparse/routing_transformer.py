"""Routing Transformer: content-based clusters by online spherical k-means (id 162; Roy et al., 2020).

    cluster c takes its w nearest queries and keys; o = softmax(q k^T / sqrt(D)) v inside it; mean over a token's clusters
The layer with local heads and centroids that follow the data: `regard.nn.RoutingAttention`.
Decoding: `RoutingAttention.step`, a new token against the stored members of its centroid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.algebra import Causal, Clustered, Input, Learned, Sizes, Window, bind
from regard.catalog import get
from regard.catalog.registry import register
from regard.engine.composed import formed
from regard.engine.door import attend
from regard.errors import RegardError


def random_units(sizes: Sizes, clusters: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(sizes.heads, clusters, sizes.head_dim), dim=-1)


# What is routed, what attends (q, k, and k where queries serve as keys), and the eps of counts and LayerNorm.
RELEASES = {
    "paper": ("layer+unit", "layer+unit", "layer+unit", "layer+unit", True, True, 0.0, 1e-5),
    "google": ("layer", "layer", "layer", "layer", False, False, 1e-2, 1e-6),
    "port": ("unit", "", "", "unit", True, True, 1e-5, 1e-5),
}


@register("routing-transformer")
def routing(
    clusters: int = 8, members: int | None = None, shared: bool = False, form: str = "paper", scaled: bool | None = None,
    hide_self: bool | None = None, count_eps: float | None = None, norm_eps: float | None = None,
) -> Clustered:  # fmt: skip
    """clusters: k, about sqrt(n). members: w a cluster (None: ceil(n / k)). shared: keys are the queries (the causal form). form: "paper":
    LayerNorm and unit length for routing and attention, logits / sqrt(D), a token of shared keys sees itself only where it would see nothing
    else, exact means over clusters. "google", as the released TensorFlow code: LayerNorm alone, logits not scaled, tokens see themselves, sums
    divided by count + 1e-2. "port", as the common PyTorch port: unit length for routing, attention on q and k as they are (unit keys where
    shared), count + 1e-5. scaled, hide_self, count_eps, norm_eps: None is the form's. Inputs `centroids` (H, k, D); `memory_k` (H, k, m, D) and
    `memory_v` (H, k, m, Dv), optional."""
    if form not in RELEASES:
        raise RegardError(f"form={form!r}; expected one of {', '.join(RELEASES)}")
    route, queries, keys, shared_keys, scale, hide, eps, norm = RELEASES[form]
    spec = Input("centroids", "hfd", layer=Learned(bind(random_units, clusters=clusters), trainable=False))
    memory = (Input("memory_k", "hffd", default="pool"), Input("memory_v", "hffe", default="pool"))
    return Clustered(
        clusters=clusters,
        members=members,
        shared=shared,
        route=route,
        queries=queries,
        keys=shared_keys if shared else keys,
        hide_self=shared and (hide if hide_self is None else hide_self),
        scaled=scale if scaled is None else scaled,
        count_eps=eps if count_eps is None else count_eps,
        norm_eps=norm if norm_eps is None else norm_eps,
        inputs=(spec, *memory),
    )


def assigned(centroids: Tensor, x: Tensor) -> Tensor:
    """(B, H, L, k): one-hot, the centroid of largest product."""
    return torch.nn.functional.one_hot((x @ centroids.transpose(-1, -2)).argmax(-1), centroids.shape[1]).to(x.dtype)


@torch.no_grad()
def update_centroids(centroids: Tensor, q: Tensor, k: Tensor | None, decay: float = 0.999, form: str = "paper") -> Tensor:
    """mu_c <- decay mu_c + (1 - decay)/2 (sum of queries + sum of keys assigned to c by argmax), renormalised; empty clusters stay.

    centroids (H, k, D) of unit length; q, k (B, H, L, D) as they enter the mechanism (k None: the queries alone). form "port": decay mu_c +
    (1 - decay) times the direction of the sum of unit q and k, not renormalised.
    """
    xs = [formed(x, "layer+unit" if form == "paper" else "unit") for x in (q, k) if x is not None]
    picks = [assigned(centroids, x) for x in xs]
    sums = sum((torch.einsum("bhlc,bhld->hcd", pick, x) for pick, x in zip(picks, xs, strict=True)), torch.zeros_like(centroids))
    touched = sum((pick.sum((0, 2)) for pick in picks), torch.zeros_like(centroids[..., 0])) > 0
    if form == "port":
        moved = decay * centroids + (1 - decay) * torch.nn.functional.normalize(sums, dim=-1)
    else:
        moved = torch.nn.functional.normalize(decay * centroids + (1 - decay) / 2 * sums, dim=-1)
    return torch.where(touched[..., None], moved, centroids)


def commitment_loss(centroids: Tensor, x: Tensor, weight: float = 1e-4, form: str = "paper") -> Tensor:
    """weight * mean squared distance of unit tokens x (B, H, L, D) to the centroid nearest to each; form "port": without LayerNorm before."""
    x = formed(x, "layer+unit" if form == "paper" else "unit")
    nearest = (x.detach() @ centroids.transpose(-1, -2)).argmax(-1)
    heads = torch.arange(centroids.shape[0], device=x.device)[:, None]
    return weight * (x - centroids[heads, nearest]).square().mean()


@dataclass
class RoutingState:
    """What decoding keeps of the tokens so far: routed keys as they attend, (B, routed, n, D), values, and clusters (B, routed, n); local
    heads' keys and values, of the last window - 1 tokens."""

    keys: Tensor
    values: Tensor
    cluster: Tensor
    near_k: Tensor
    near_v: Tensor


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

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    @torch.no_grad()
    def step(self, x: Tensor, state: RoutingState | None = None) -> tuple[Tensor, RoutingState]:
        """New tokens (B, n, dim), one or several: a routed head reads the stored tokens whose nearest centroid is the new token's, and the token itself
        where there are none. This is not `forward`, whose clusters take their tokens from the whole sequence, those that follow too."""
        if not self.causal:
            raise RegardError("step needs causal=True: without it earlier outputs would change with every token")
        (q, k, v), split, n = self.split(x), self.routed, x.shape[1]
        own = formed(q[:, :split], "layer+unit")
        cluster = (own @ self.centroids.mT).argmax(-1)
        if state is None:
            none = [y[:, :, :0] for y in (own, v[:, :split], cluster, k[:, split:], v[:, split:])]
            state = RoutingState(*none)
        new = (own, v[:, :split], cluster, k[:, split:], v[:, split:])
        old = (state.keys, state.values, state.cluster, state.near_k, state.near_v)
        keys, values, clusters, near_k, near_v = (torch.cat(pair, 2) for pair in zip(old, new, strict=True))
        token = torch.arange(keys.shape[2] - n, keys.shape[2], device=x.device)[:, None]
        place = torch.arange(keys.shape[2], device=x.device)
        seen = (clusters[:, :, None] == cluster[..., None]) & (place < token)
        seen |= ~seen.any(-1, keepdim=True) & (place == token)
        out = [nn.functional.scaled_dot_product_attention(own, keys, values, attn_mask=seen)]
        if split < self.heads:
            out.append(attend(q[:, split:], near_k, near_v, "softmax", mask=Causal() & Window(self.window)))
        last = max(0, near_k.shape[2] - self.window + 1)
        kept = RoutingState(keys, values, clusters, near_k[:, :, last:], near_v[:, :, last:])
        return self.out(torch.cat(out, 1).transpose(1, 2).flatten(-2)), kept

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.split(x)
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
