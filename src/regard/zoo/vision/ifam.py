"""iFAM: a first transformer marks the parts that matter, a second sees nothing else (id 231; Aniraj et al., 2025).

l_nk = -|x_n - p_k|^2 over K parts and a background;  maps = softmax((l + g) / tau);  f_k = mean_n maps_nk x_n, LayerNorm, one classifier of all
y = softmax((l + g') / tau), in training whole parts dropped;  M_n = 1[max_k<=K y_nk >= y_n,K+1], with the gradient of sum_k<=K y_nk
the second: A'_ij = A_ij M_j / sum_k A_ik M_k in every layer, class and register tokens visible;  at inference what is masked is taken out
g, g': Gumbel noise. The released code casts M to booleans in the second transformer, which stops the gradient; here it passes.
Not reproduced: the first stage finding the foreground where backgrounds tell the class. Two copies of the ViT on digits that comes with regard, trained
together for 80 steps on digits whose background's colour is the digit's in 95 of 100 images, mark 90% of the patches as parts, 51% of these with ink on
them (50% have), and lose 23 points of accuracy when backgrounds are exchanged; one ViT alone loses 26. With the true mask little is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images import part_maps
from regard.nn.images.part_discovery import PartDiscovery, Parts
from regard.nn.images.vit_host import embedded, host_of, masked_tokens


class Faithful(NamedTuple):
    """logits (B, classes) of what is seen, and the first stage's `Parts`, whose logits' mean over parts is its own prediction."""

    logits: Tensor
    parts: Parts


@register("ifam", kind="module")
class TwoStageFaithful(nn.Module):
    """Images -> `Faithful`. first, second: ViTs of timm's make, the second with a class token. removed: parts to be hidden, in evaluation. soft: the mask
    between 0 and 1. In evaluation masked patches are taken out of the second (all of them, if one image is given). frozen: the first stage and its parts
    stay as they are, in evaluation and without gradients, and the second alone learns."""

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        classes: int = 200,
        parts: int = 8,
        soft: bool = False,
        frozen: bool = False,
        **options: Any,
    ):
        super().__init__()
        self.first, self.second = host_of(first), host_of(second)
        if not getattr(second, "has_class_token", self.second.num_prefix_tokens):
            raise RegardError("second has no class token; expected a ViT that reads its answer off one")
        self.colours = self.first.patch_embed.proj.in_channels
        self.discovery, self.soft = PartDiscovery(self.first.embed_dim, parts, classes, **options), soft
        self.norm, self.head = nn.LayerNorm(self.second.embed_dim), nn.Linear(self.second.embed_dim, classes, bias=False)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        self.frozen = frozen
        if frozen:
            self.first.requires_grad_(False)
            self.discovery.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.first.eval()
            self.discovery.eval()
        return self

    def found(self, images: Tensor, noise: Tensor | None = None) -> Parts:
        """The first stage alone."""
        x = embedded(self.first, images)
        for block in self.first.blocks:
            x = block(x)
        x = self.first.norm(x)[:, self.first.num_prefix_tokens :]
        return self.discovery(x, tuple(self.first.patch_embed.grid_size), noise)  # type: ignore[no-any-return]

    def seen(self, images: Tensor, mask: Tensor, remove: bool = False) -> Tensor:
        """The second stage alone: logits (B, classes) by the patches of mask (B, N)."""
        return self.head(self.norm(masked_tokens(self.second, images, mask, self.soft, remove)[:, 0]))  # type: ignore[no-any-return]

    def forward(self, images: Tensor, removed: Sequence[int] = (), noise: Tensor | None = None) -> Faithful:
        if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != self.colours:
            came = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise RegardError(f"images is {came}; expected (batch, colours={self.colours}, height, width)")
        parts = self.found(images, noise)
        if removed:
            if self.training:
                raise RegardError("removed parts in training; expected eval()")
            parts = self.discovery.without(parts, removed)
        return Faithful(self.seen(images, parts.soft if self.soft else parts.mask, remove=not self.training), parts)


WEIGHTS = {
    "first": 1.0,
    "second": 1.0,
    "variation": 1.0,
    "presence": 1.0,
    "border": 2.0,
    "entropy": 1.0,
    "orthogonal": 1.0,
    "equivariant": 1.0,
}


def ifam_losses(
    model: TwoStageFaithful, images: Tensor, labels: Tensor, angle: float, shift: tuple[int, int], scale: float, noise: Tensor | None = None
) -> dict[str, Tensor]:
    """The terms of the loss, each without its weight in WEIGHTS: the whole is sum of WEIGHTS[name] * term. angle in degrees, shift in pixels and scale are
    of the image that the maps must follow, the paper's from -90 to 90 degrees."""
    out = model(images, noise=noise)
    parts, side = out.parts, images.shape[-1]
    moved = model.found(part_maps.turned(images, angle, shift, scale), noise).maps
    places = (shift[0] * parts.maps.shape[-1] / side, shift[1] * parts.maps.shape[-1] / side)
    return {
        "first": F.cross_entropy(parts.logits.mean(1), labels),
        "second": F.cross_entropy(out.logits, labels),
        "variation": part_maps.total_variation(parts.maps),
        "presence": part_maps.presence(parts.maps),
        "border": part_maps.background_at_borders(parts.maps),
        "entropy": part_maps.entropy(parts.maps),
        "orthogonal": part_maps.orthogonality(parts.features),
        "equivariant": part_maps.equivariance(parts.maps, moved, angle, places, scale),
    }


@torch.no_grad()
def faithfulness_test(model: TwoStageFaithful, images: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(B,): the largest change of the second stage's logits when every masked patch of the images becomes noise; zero, if it is faithful."""
    size = model.second.patch_embed.patch_size
    hidden = (mask == 0).unflatten(1, tuple(model.second.patch_embed.grid_size))
    hidden = hidden.repeat_interleave(size[0], 1).repeat_interleave(size[1], 2)[:, None]
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype, device=images.device)
    return (model.seen(images, mask) - model.seen(torch.where(hidden, noise, images), mask)).abs().amax(1)
