"""Maps of parts (B, K + 1, H, W), the last the background, that sum to one a place: the losses that shape them (van der Klis et al., 2023;
Aniraj et al., 2024), each a mean that is zero or small where it is satisfied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import RegardError
from . import timm_host


def total_variation(maps: Tensor) -> Tensor:
    """Absolute differences of neighbours, summed over all, over B H W."""
    steps = (maps[..., 1:, :] - maps[..., :-1, :]).abs().sum() + (maps[..., 1:] - maps[..., :-1]).abs().sum()
    return steps / (maps.shape[0] * maps.shape[2] * maps.shape[3])


def smoothed(maps: Tensor) -> Tensor:
    """Means over 3 x 3 places."""
    if min(maps.shape[2:]) < 3:
        raise RegardError(f"maps of {tuple(maps.shape[2:])} places; expected at least 3 x 3, over which this loss takes means")
    return F.avg_pool2d(maps, 3, 1)


def presence(maps: Tensor) -> Tensor:
    """1 - the mean over parts of the batch's highest smoothed value: each part is somewhere in some image."""
    return 1 - smoothed(maps[:, :-1]).amax((2, 3)).amax(0).mean()


def background_at_borders(maps: Tensor) -> Tensor:
    """-log of the background's highest smoothed value, weighed by the squared distance from the centre (1 in the corners), the mean over images."""
    ground = smoothed(maps[:, -1:])[:, 0]
    rows, columns = (torch.linspace(-1, 1, n, dtype=maps.dtype, device=maps.device) for n in ground.shape[1:])
    far = rows[:, None].square() + columns.square()
    highest = (ground * far / far.max()).amax((1, 2))
    return F.binary_cross_entropy(highest, torch.ones_like(highest))


def entropy(maps: Tensor) -> Tensor:
    """Of the parts at each place, the mean: parts are apart."""
    return -torch.xlogy(maps, maps).sum(1).mean()


def orthogonality(parts: Tensor) -> Tensor:
    """Squared cosines of different parts' vectors (B, K + 1, C), the mean over all pairs, and of the own ones less one."""
    unit = F.normalize(parts, dim=-1)
    return (unit @ unit.mT - torch.eye(parts.shape[1], dtype=parts.dtype, device=parts.device)).square().mean()


def turned(x: Tensor, angle: float, shift: tuple[int, int], scale: float, back: bool = False) -> Tensor:
    """x (B, C, H, W) turned about its centre by `angle` degrees, enlarged `scale` times and moved `shift` pixels (right, down); back: undone."""
    affine = timm_host.load("torchvision").transforms.functional.affine
    if not back:
        bilinear = timm_host.load("torchvision").transforms.InterpolationMode.BILINEAR
        return affine(x, angle, list(shift), scale, [0.0, 0.0], interpolation=bilinear)  # type: ignore[no-any-return]
    x = affine(x, 0.0, [-s for s in shift], 1.0, [0.0, 0.0])
    return affine(x, -angle, [0, 0], 1 / scale, [0.0, 0.0])  # type: ignore[no-any-return]


def equivariance(maps: Tensor, moved: Tensor, angle: float, shift: tuple[float, float], scale: float) -> Tensor:
    """1 - the mean cosine of the parts' maps and of those of the turned image, turned back; shift in places of the maps."""
    again = turned(moved, angle, shift, scale, back=True)  # type: ignore[arg-type]
    return 1 - F.cosine_similarity(maps[:, :-1].flatten(2), again[:, :-1].flatten(2), dim=-1).mean()
