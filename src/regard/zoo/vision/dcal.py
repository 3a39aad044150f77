"""Dual cross-attention learning: the patches that matter read the whole image, and images read one another in training (id 141; Zhu et al., 2022).

rollout: S_hat_l = (S_l + I)/2 ... (S_1 + I)/2, S_l mean over heads of block l's softmax weights
GLCA: queries of the R patches (and the class token) of largest S_hat[class, .], keys and values of all tokens, a block of its own
PWCA: softmax(q_1 [k_1; k_2]^T / sqrt(d)) [v_1; v_2] in every block, weights of self-attention, label of image 1; in training alone
L = 1/2 sum_i (e^{-w_i} L_i + w_i) over self-attention, GLCA and PWCA, L_i cross-entropy, and for re-identification a triplet loss on class tokens as well
Answer: sum of the two heads' class probabilities; for re-identification the two class tokens side by side.  No code is released; triplets are of the
hardest of a batch, Euclidean, as in TransReID, on which the paper builds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.images.vit_host import after_attention, attention, closed, embedded, heads_of, host_of, weights_of
from regard.nn.parts import takes
from regard.nn.retrieval import triplet_batch_hard


def rollout(weights: Sequence[Tensor]) -> Tensor:
    """Weights (B, H, N, N) of each block, first to last -> (B, N, N), rows of which sum to one."""
    if not weights:
        raise RegardError("weights of no block; expected one at least")
    total: Tensor | None = None
    for block in weights:
        mean = block.mean(1)
        step = (mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)) / 2
        total = step if total is None else step @ total
    assert total is not None
    return total


def chosen(rolled: Tensor, ratio: float) -> Tensor:
    """Tokens (B, 1 + R) whose queries GLCA keeps: the class token, then the patches to which its row of the rollout gives most; R = max(1,
    int(ratio N)) of N patches."""
    if not 0 < ratio <= 1:
        raise RegardError(f"ratio={ratio}; expected above 0 and at most 1")
    row = rolled[:, 0, 1:]
    best = row.topk(max(1, int(ratio * row.shape[1])), 1).indices + 1
    return torch.cat((torch.zeros_like(best[:, :1]), best), 1)


def glca(attn: nn.Module, y: Tensor, at: Tensor) -> Tensor:
    """Normed tokens y (B, N, dim), queries of tokens `at` (B, R) -> (B, R, dim)."""
    q, k, v = heads_of(attn, y)
    q = q.gather(2, at[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    own = y.gather(1, at[..., None].expand(-1, -1, y.shape[2]))
    return closed(attn, attend(q, k, v, scale=attn.scale), own)  # type: ignore[arg-type]


def pairwise_cross_attention(y: Tensor, other: Tensor, attn: nn.Module) -> Tensor:
    """Queries of normed tokens y (B, N, dim), keys and values of both images under one softmax -> (B, N, dim)."""
    return attention(attn, y, source=other)


class DCALOutput(NamedTuple):
    """Logits (B, classes) of self-attention, of GLCA, and in training of PWCA; and the class tokens (B, dim) that each is of."""

    whole: Tensor
    local: Tensor
    pair: Tensor | None
    tokens: tuple[Tensor, Tensor, Tensor | None]

    @property
    def probabilities(self) -> Tensor:
        """(B, classes): the sum of both heads' at inference, from 0 to 2."""
        return self.whole.softmax(-1) + self.local.softmax(-1)

    @property
    def features(self) -> Tensor:
        """(B, 2 dim): what images are compared by, class tokens of self-attention and of GLCA."""
        return torch.cat(self.tokens[:2], -1)  # type: ignore[arg-type]


@register("dcal", kind="module")
class DCAL(nn.Module):
    """Images (B, C, H, W) -> `DCALOutput`. The ViT of timm learns with it; one GLCA block, a copy of the host's last with weights of its own.

    ratio: of patches whose queries GLCA keeps (0.1 for fine-grained classification, 0.3 for re-identification). partner in the call (B,): the
    distractor of each image, a number in the batch (None, in training: the batch moved around by a random step).
    """

    def __init__(self, vit: nn.Module, classes: int, ratio: float = 0.1):
        super().__init__()
        self.vit = host_of(vit)
        if not 0 < ratio <= 1 or self.vit.num_prefix_tokens != 1:
            raise RegardError(
                f"ratio={ratio}, host with {self.vit.num_prefix_tokens} first tokens; expected 0 < ratio <= 1 and a class token alone"
            )
        self.ratio, self.colours, dim = ratio, self.vit.patch_embed.proj.in_channels, self.vit.embed_dim
        self.local, self.local_norm = copy.deepcopy(self.vit.blocks[-1]), copy.deepcopy(self.vit.norm)
        self.head, self.local_head = nn.Linear(dim, classes), nn.Linear(dim, classes)
        self.balance = nn.Parameter(torch.zeros(3))

    @takes(images="batch colours height width")
    def features(self, images: Tensor, partner: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Normed class tokens (B, dim) of self-attention, GLCA and, with partners, PWCA."""
        x, maps = embedded(self.vit, images), []
        pair = None if partner is None else x
        for block in self.vit.blocks:
            y = block.norm1(x)
            if pair is not None and partner is not None:
                both = pairwise_cross_attention(block.norm1(pair), y[partner], block.attn)
                pair = after_attention(block, pair, both)
            maps.append(weights_of(block.attn, y))
            x = after_attention(block, x, attention(block.attn, y))
        at = chosen(rollout(maps).detach(), self.ratio)
        kept = x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))
        local = after_attention(self.local, kept, glca(self.local.attn, self.local.norm1(x), at))
        return self.vit.norm(x)[:, 0], self.local_norm(local)[:, 0], None if pair is None else self.vit.norm(pair)[:, 0]

    def forward(self, images: Tensor, partner: Tensor | None = None) -> DCALOutput:
        if partner is None and self.training and isinstance(images, Tensor) and images.dim() == 4 and len(images) > 1:
            partner = (torch.arange(len(images)) + int(torch.randint(1, len(images), ()))).remainder(len(images)).to(images.device)
        whole, local, pair = tokens = self.features(images, partner)
        return DCALOutput(self.head(whole), self.local_head(local), None if pair is None else self.head(pair), tokens)

    def loss(self, out: DCALOutput, labels: Tensor, margin: float | None = None) -> Tensor:
        """1/2 sum_i (e^{-w_i} L_i + w_i) of cross-entropies; without PWCA's, of two. margin: of the triplet loss that each L_i has beside it (None: no
        such loss); the batch then has two identities or more."""
        losses = []
        for logits, token in zip(out[:3], out.tokens, strict=True):
            if logits is not None and token is not None:
                triplet = 0.0 if margin is None else triplet_batch_hard(token, labels, margin, cosine=False)
                losses.append(F.cross_entropy(logits, labels) + triplet)
        weights = self.balance[: len(losses)]
        return (torch.exp(-weights) * torch.stack(losses) + weights).sum() / 2
