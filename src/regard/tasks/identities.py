"""Generated identities for retrieval: images and tracks of images, some frames of which show nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def patterns(count: int, generator: torch.Generator, shape: tuple[int, int] = (8, 8), colours: int = 3) -> Tensor:
    """What each identity looks like, (count, colours, H, W): smooth random fields."""
    coarse = torch.randn(count, colours, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=shape, mode="bilinear", align_corners=False)


def tracks(
    looks: Tensor, each: int, generator: torch.Generator, frames: int = 4, empty: int = 2, noise: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """`each` tracks of every identity: x (n, frames, colours, H, W), identities (n,), and which frames are empty (n, frames) bool: `empty` of them
    hold noise alone, of the same spread as the looks."""
    label = torch.arange(len(looks)).repeat_interleave(each)
    x = looks[label][:, None].expand(-1, frames, -1, -1, -1).clone()
    x = x + noise * torch.randn(x.shape, generator=generator)
    bare = torch.rand(len(label), frames, generator=generator).argsort(1) < empty
    nothing = torch.randn(x.shape, generator=generator) * (looks.std() ** 2 + noise**2) ** 0.5
    return torch.where(bare[..., None, None, None], nothing, x), label, bare
