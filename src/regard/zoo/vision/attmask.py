"""AttMask: masked image modelling that hides what the teacher attends to most (id 281; Kakogeorgiou et al., 2022).

a = mean over heads of the teacher's last row class -> patches;  n = floor(r N).  high: the n largest hidden;  low: the n smallest
hint: high, then floor(s r N) of the floor(s N) largest shown again, by chance;  each image is masked with probability 1/2
L = l1 DINO (class tokens across views, teacher centred, at 0.04, student at 0.1) + l2 MIM (masked patches, the same view)
block: BEiT's rectangles, random: any patches, both blind to a.  Small crops go to the student alone, unmasked, and into the class loss.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.vit_host import embedded, host_of, weights_of

MODES = ("high", "hint", "low", "random", "block")


@register("attmask", kind="function")
@torch.no_grad()
def attmask(
    attention: Tensor,
    mode: str = "high",
    ratio: float = 0.3,
    prob: float = 0.5,
    show: float = 0.1,
    draw: Tensor | None = None,
    order: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which patches to hide, (B, N) bool, of the class token's attention on patches (B, N).

    mode: "high", "hint", "low", "random" or "block". prob: of masking an image. show: s of "hint". draw (B,): uniform numbers; images below prob are masked.
    order (B, N): uniform numbers, the smallest of which are shown in "hint" and hidden in "random". grid (h, w): of the patches, and generator, for "block" (None: a square, and the usual one).
    """
    if attention.dim() != 2 or mode not in MODES or not all(0 <= x <= 1 for x in (ratio, prob, show)):
        raise RegardError(
            f"attention {tuple(attention.shape)}, mode={mode!r}, {ratio=}, {prob=}, {show=}; expected (B, N), one of {MODES}, shares in [0, 1]"
        )
    (batch, n), device = attention.shape, attention.device
    draw = torch.rand(batch, device=device) if draw is None else draw
    order = torch.rand(batch, n, device=device) if order is None else order
    if draw.shape != (batch,) or order.shape != (batch, n):
        raise RegardError(f"draw {tuple(draw.shape)}, order {tuple(order.shape)}; expected ({batch},) and ({batch}, {n})")
    if mode == "block":
        side = math.isqrt(n)
        shape = grid or (side, side)
        if shape[0] * shape[1] != n:
            raise RegardError(f"grid={grid} of {n} patches; expected (h, w) with h w = {n}")
        blocks = [block_mask(shape, ratio, generator).flatten() for _ in range(batch)]
        return torch.stack(blocks).to(device) & (draw < prob)[:, None] if blocks else attention > 0
    score = {"high": -attention, "hint": -attention, "low": attention, "random": order}[mode]
    hidden = score.argsort(dim=1, stable=True).argsort(1) < int(n * ratio)
    if mode == "hint":
        top = score.argsort(dim=1, stable=True).argsort(1) < int(n * show)
        shown = order.masked_fill(~top, torch.inf).argsort(1).argsort(1) < min(int(ratio * show * n), int(n * show))
        hidden &= ~shown
    return hidden & (draw < prob)[:, None]


def block_mask(shape: tuple[int, int], ratio: float, generator: torch.Generator | None = None, aspect: float = 0.3) -> Tensor:
    """Rectangles (H, W) bool that hide at most ratio H W patches in all, their sides' ratio log-uniform in [aspect, 1 / aspect] (BEiT's)."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    (h, w), mask = shape, torch.zeros(shape, dtype=torch.bool)
    limit, least = int(ratio * h * w), (min(shape) // 3) ** 2
    while int(mask.sum()) < limit:
        left = limit - int(mask.sum())
        for _ in range(10):
            area, sides = between(least, left), math.exp(between(math.log(aspect), -math.log(aspect)))
            rows, columns = round(math.sqrt(area * sides)), round(math.sqrt(area / sides))
            if not (0 < rows < h and 0 < columns < w):
                continue
            i, j = int(between(0, h - rows + 1)), int(between(0, w - columns + 1))
            part = mask[i : i + rows, j : j + columns]
            if 0 < rows * columns - int(part.sum()) <= left:
                part.fill_(True)
                break
        else:
            break
    return mask


class Views(NamedTuple):
    """Of V views of B images, view by view: classes (V B, K) and patches (V B, N, K) before the softmax."""

    classes: Tensor
    patches: Tensor


class IBOTLoss(nn.Module):
    """The two cross-entropies, and centres of the teacher's outputs that follow with `momentum` (of patches with patch_momentum). weights: l1, l2."""

    def __init__(
        self,
        classes: int,
        patches: int,
        views: int = 2,
        student_temp: float = 0.1,
        momentum: float = 0.9,
        weights: tuple[float, float] = (1.0, 1.0),
        patch_momentum: float = 0.9,
    ):
        super().__init__()
        if views < 2:
            raise RegardError(f"views={views}; expected two or more, for the class loss goes across them")
        self.views, self.student_temp, self.weights = views, student_temp, weights
        self.momentum, self.patch_momentum = momentum, patch_momentum
        self.centre: Tensor
        self.patch_centre: Tensor
        self.register_buffer("centre", torch.zeros(1, classes))
        self.register_buffer("patch_centre", torch.zeros(1, 1, patches))

    def forward(
        self, student: Views, teacher: Views, masked: Tensor, temp: float = 0.04, patch_temp: float = 0.04, local: Tensor | None = None
    ) -> Tensor:
        """masked (V B, N) bool. temp, patch_temp: the teacher's. local: the student's class outputs of small views, (L B, K)."""
        classes = student.classes if local is None else torch.cat((student.classes, local))
        size = len(student.classes) // self.views
        logs = (classes / self.student_temp).log_softmax(-1).split(size)
        wanted = ((teacher.classes - self.centre) / temp).softmax(-1).detach().split(size)
        terms = [-(q * p).sum(-1).mean() for i, q in enumerate(wanted) for j, p in enumerate(logs) if i != j]
        patch = ((teacher.patches - self.patch_centre) / patch_temp).softmax(-1).detach()
        apart = -(patch * (student.patches / self.student_temp).log_softmax(-1)).sum(-1)
        mim = ((apart * masked).sum(-1) / masked.sum(-1).clamp_min(1)).mean()
        with torch.no_grad():
            patches = teacher.patches.mean(1, keepdim=True)
            for centre, seen, rate in ((self.centre, teacher.classes, self.momentum), (self.patch_centre, patches, self.patch_momentum)):
                centre.mul_(rate).add_(seen.mean(0, keepdim=True), alpha=1 - rate)
        return self.weights[0] * torch.stack(terms).mean() + self.weights[1] * mim


class MaskedDistiller(nn.Module):
    """A student and its slowly following teacher, both a copy of a timm ViT with one head for class and patches.

    Each call takes views, a list of (B, C, H, W): the teacher sees them whole, its last block's attention masks them for the student. mode, prob, show:
    of `attmask`; ratio +- spread: drawn a call. weights: l1 and l2; l2 = 0 is class distillation alone, its student seeing masked images. head: width -> the head (None: linear, GELU, linear). momentum(step, steps) is the paper's.
    """

    def __init__(
        self,
        vit: nn.Module,
        outputs: int = 256,
        mode: str = "high",
        ratio: float = 0.3,
        spread: float = 0.2,
        prob: float = 0.5,
        show: float = 0.1,
        views: int = 2,
        weights: tuple[float, float] = (1.0, 1.0),
        head: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        host = host_of(vit)
        if host.num_prefix_tokens != 1:
            raise RegardError(f"host with {host.num_prefix_tokens} first tokens; expected a class token alone")
        dim = host.embed_dim
        made = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, outputs)) if head is None else head(dim)
        self.student = nn.ModuleDict({"vit": host, "head": made})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.mask_token, self.loss = nn.Parameter(torch.zeros(dim)), IBOTLoss(outputs, outputs, views, weights=weights)
        self.mode, self.ratio, self.spread, self.prob, self.show = mode, ratio, spread, prob, show

    def seen(self, model: nn.ModuleDict, images: Tensor, masked: Tensor | None = None) -> tuple[Views, Tensor]:
        """Outputs, and the last block's attention of the class token on patches (B, N), averaged over heads."""
        vit = model["vit"]
        x = embedded(vit, images, masked, self.mask_token)
        for block in vit.blocks[:-1]:  # type: ignore[index, union-attr]
            x = block(x)
        last = vit.blocks[-1]  # type: ignore[index, union-attr]
        attention = weights_of(last.attn, last.norm1(x))[:, :, 0, 1:].mean(1)  # type: ignore[union-attr, operator]
        out = model["head"](vit.norm(last(x)))  # type: ignore[operator]
        return Views(out[:, 0], out[:, 1:]), attention

    def forward(
        self,
        views: Sequence[Tensor],
        masked: Tensor | None = None,
        local: Sequence[Tensor] = (),
        temp: float = 0.04,
        patch_temp: float = 0.04,
    ) -> Tensor:
        """The loss; masked (V B, N) bool in place of `attmask`'s. local: small crops of the same B images, each (B, C, h, w), for a host made with
        dynamic_img_size=True if they are not of its size. temp, patch_temp: the teacher's."""
        images = torch.cat(list(views))
        with torch.no_grad():
            wanted, attention = self.seen(self.teacher, images)
        if masked is None:
            ratio = self.ratio + self.spread * (2 * float(torch.rand(())) - 1)
            grid = self.student["vit"].patch_embed.dynamic_feat_size(images.shape[2:])  # type: ignore[operator, union-attr]
            masked = attmask(attention, self.mode, min(max(ratio, 0.0), 1.0), self.prob, self.show, grid=grid)
        small = [self.seen(self.student, crop)[0].classes for crop in local]
        if any(len(one) != len(views[0]) for one in small):
            raise RegardError(f"local crops of {[len(one) for one in small]} images; expected {len(views[0])} in each, as in the views")
        student = self.seen(self.student, images, masked)[0]
        return self.loss(student, wanted, masked, temp, patch_temp, torch.cat(small) if small else None)  # type: ignore[no-any-return]

    @torch.no_grad()
    def follow(self, momentum: float = 0.996) -> None:
        """teacher <- momentum teacher + (1 - momentum) student."""
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.mul_(momentum).add_(fast.detach(), alpha=1 - momentum)


def momentum(step: int, steps: int, first: float = 0.996) -> float:
    """From `first` to 1 along half a cosine."""
    return 1 - (1 - first) * (math.cos(math.pi * step / steps) + 1) / 2


def temperature(step: int, warmup: int, first: float = 0.04, last: float = 0.07) -> float:
    """The teacher's for patches: from `first` to `last` in `warmup` equal steps, then `last`."""
    return last if step >= warmup - 1 else first + (last - first) * step / (warmup - 1)
