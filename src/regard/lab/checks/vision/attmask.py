"""Checks of attmask."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.planes import gelu, layer_norm
from regard.lab.checks.shared.shipped_vit import inked, shipped, unseen
from regard.lab.checks.shared.vits import block_by_hand, projected, scores, small_vit, tokens_by_hand
from regard.lab.verification import check
from regard.nn.images.vit_host import embedded, weights_of
from regard.zoo.vision.attmask import IBOTLoss, MaskedDistiller, Views, attmask


@check(
    "attmask",
    "masks of 50 images off sorted lists: high, low, hint with given draws, random, at ratios 0.3 and 0.77",
    below=0.0,
    control="high for low",
)
def _() -> tuple[float, float]:
    a, draw, order = torch.rand(50, 23), torch.rand(50), torch.rand(50, 23)

    def by_hand(mode: str, ratio: float, prob: float) -> Tensor:
        out = torch.zeros(50, 23, dtype=torch.bool)
        for b in range(50):
            if float(draw[b]) >= prob:
                continue
            key = {"low": a, "random": order}.get(mode, -a)[b]
            ranked = sorted(range(23), key=lambda i: float(key[i]))
            hidden = set(ranked[: int(23 * ratio)])
            if mode == "hint":
                top = ranked[: int(23 * 0.4)]
                hidden -= set(sorted(top, key=lambda i: float(order[b, i]))[: int(ratio * 0.4 * 23)])
            out[b, list(hidden)] = True
        return out

    def off(mode: str, wanted: str) -> float:
        pairs = [(ratio, prob) for ratio in (0.3, 0.77) for prob in (0.0, 0.6, 1.0)]
        return float(sum((attmask(a, mode, r, p, 0.4, draw, order) != by_hand(wanted, r, p)).sum() for r, p in pairs))

    return sum(off(mode, mode) for mode in ("high", "low", "hint", "random")), off("high", "low")


def objects() -> tuple[Tensor, Tensor]:
    """Attention (40, 64) peaked on a 4 x 4 object of an 8 x 8 grid, and where it is."""
    where = torch.zeros(40, 8, 8, dtype=torch.bool)
    for b in range(40):
        i, j = torch.randint(5, (2,)).tolist()
        where[b, i : i + 4, j : j + 4] = True
    where = where.flatten(1)
    return (torch.randn(40, 64) + 4 * where).softmax(1), where


@check("attmask", "share of the object that high hides at a ratio of its size", above=0.95, control="random masks")
def _() -> tuple[float, float]:
    a, where = objects()
    return tuple(float((attmask(a, mode, 0.25, 1.0) & where).sum() / where.sum()) for mode in ("high", "random"))  # type: ignore[return-value]


@check(
    "attmask",
    "error of copying the nearest visible patch under high, over that under random masks, objects of one code each (mean of 5 draws)",
    above=1.5,
    control="under low",
)
def _() -> tuple[float, float]:
    at = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), -1).flatten(0, 1).float()
    far = torch.cdist(at, at)

    def error(mode: str) -> float:
        total = 0.0
        for _ in range(5):
            a, where = objects()
            patches = torch.where(where[..., None], torch.randn(40, 1, 8), 0.3 * torch.randn(40, 64, 8))
            hidden = attmask(a, mode, 0.25, 1.0)
            near = (far + torch.where(hidden[:, None], torch.inf, 0.0)).argmin(2)
            gap = (patches - patches.gather(1, near[..., None].expand(-1, -1, 8))).square().mean(2)
            total += float((gap * hidden).sum() / hidden.sum()) / 5
        return total

    plain = error("random")
    return error("high") / plain, error("low") / plain


@check(
    "attmask",
    "loss of three views, one small, and of images none of whose patches are hidden, values, gradients and centres after two calls == term by term",
    below=1e-12,
    control="class tokens within a view too",
)
def _() -> tuple[float, float]:
    loss = IBOTLoss(5, 5, weights=(0.7, 1.3)).to(F64)
    classes, patches, small = (torch.randn(*s, dtype=F64, requires_grad=True) for s in ((4, 5), (4, 3, 5), (2, 5)))
    centre, patch_centre, gaps, other = torch.zeros(5, dtype=F64), torch.zeros(5, dtype=F64), [], 0.0
    masked = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)
    for temp in (0.5, 0.8):
        t = Views(torch.randn(4, 5, dtype=F64), torch.randn(4, 3, 5, dtype=F64))

        def by_hand(within: bool, t: Views = t, temp: float = temp, centre: Tensor = centre, patch_centre: Tensor = patch_centre) -> Tensor:
            dino, mim = [], []
            for q in range(2):
                for v, out in enumerate((classes[:2], classes[2:], small)):
                    if v == q and not within:
                        continue
                    for b in range(2):
                        dino.append(-(((t.classes[2 * q + b] - centre) / temp).softmax(0) * (out[b] / 0.1).log_softmax(0)).sum())
            for i in range(4):
                ce = [
                    -(((t.patches[i, n] - patch_centre) / (temp / 2)).softmax(0) * (patches[i, n] / 0.1).log_softmax(0)).sum()
                    for n in range(3)
                    if masked[i, n]
                ]
                mim.append(torch.stack(ce).mean() if ce else torch.zeros((), dtype=F64))
            return 0.7 * torch.stack(dino).mean() + 1.3 * torch.stack(mim).mean()

        truth, wrong = by_hand(False), by_hand(True)
        found = loss(Views(classes, patches), t, masked, temp, temp / 2, small)
        gaps.append(gap_with_gradients(found, truth, (classes, patches, small)))
        other = naive.gap(found, wrong)
        centre = 0.9 * centre + 0.1 * t.classes.mean(0)
        patch_centre = 0.9 * patch_centre + 0.1 * t.patches.mean((0, 1))
        gaps += [naive.gap(loss.centre[0], centre), naive.gap(loss.patch_centre[0, 0], patch_centre)]
    return max(gaps), other


@check(
    "attmask",
    "a step of student and teacher: masks of the teacher's last class row, outputs of masked images, and the teacher a step later == by hand",
    below=1e-10,
    control="masks of the first block's attention",
)
def _() -> tuple[float, float]:
    net = MaskedDistiller(small_vit(2), 6, spread=0.0, prob=1.0).to(F64)
    net.mask_token.data.normal_()
    views = [torch.randn(2, 3, 16, 16, dtype=F64) for _ in range(2)]
    images, head = torch.cat(views), net.student["head"]

    def run(vit: torch.nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        rows = []
        for block in vit.blocks:  # type: ignore[union-attr]
            q, k, _ = projected(block.attn, layer_norm(x, block.norm1, 1e-6))  # type: ignore[arg-type]
            rows.append(scores(block.attn, q, k).softmax(-1)[:, :, 0, 1:].mean(1))
            x = block_by_hand(block, x)
        x = layer_norm(x, vit.norm, 1e-6)  # type: ignore[arg-type]
        first, last = head[0], head[2]  # type: ignore[index]
        return gelu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias, rows

    vit = net.student["vit"]
    plain = tokens_by_hand(vit, images)
    wanted, rows = run(vit, plain)

    def loss_of(row: Tensor) -> Tensor:
        hidden = torch.zeros(4, 16, dtype=torch.bool).scatter(1, row.argsort(1, descending=True)[:, : int(16 * 0.3)], True)
        x = torch.cat((plain[:, :1], torch.where(hidden[..., None], net.mask_token + vit.pos_embed[:, 1:], plain[:, 1:])), 1)  # type: ignore[index]
        out, fresh = run(vit, x)[0], IBOTLoss(6, 6).to(F64)
        return fresh(Views(out[:, 0], out[:, 1:]), Views(wanted[:, 0], wanted[:, 1:]), hidden)  # type: ignore[no-any-return]

    truth, other = loss_of(rows[-1]), loss_of(rows[0])
    found = net(views)
    slow = [p.clone() for p in net.teacher.parameters()]
    with torch.no_grad():
        for p in net.student.parameters():
            p.add_(1.0)
    net.follow(0.9)
    moved = max(naive.gap(a, b + 0.1) for a, b in zip(net.teacher.parameters(), slow, strict=True))
    return max(naive.gap(found, truth), moved), naive.gap(found, other)


@check(
    "attmask",
    "rectangles of block masks: masks of 60 images that are not what rectangles drawn in turn make, or hide more than their ratio",
    below=0.0,
    control="random masks, whose hidden patches have fewer hidden neighbours",
)
def _() -> tuple[float, float]:
    a, draw = torch.rand(60, 12 * 16), torch.rand(60)
    found = attmask(a, "block", 0.4, 0.7, draw=draw, grid=(12, 16), generator=torch.Generator().manual_seed(3))
    again = torch.Generator().manual_seed(3)

    def number(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=again))

    def by_hand() -> Tensor:
        hidden: set[tuple[int, int]] = set()
        while len(hidden) < int(0.4 * 192):
            left, before = int(0.4 * 192) - len(hidden), len(hidden)
            for _ in range(10):
                area, ratio = number(16, left), math.exp(number(math.log(0.3), math.log(1 / 0.3)))
                h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
                if 0 < h < 12 and 0 < w < 16:
                    top, start = int(number(0, 13 - h)), int(number(0, 17 - w))
                    cells = {(top + i, start + j) for i in range(h) for j in range(w)} - hidden
                    if 0 < len(cells) <= left:
                        hidden |= cells
                        break
            if len(hidden) == before:
                break
        return torch.tensor([[(i, j) in hidden for j in range(16)] for i in range(12)]).flatten()

    truth = torch.stack([by_hand() for _ in range(60)]) & (draw < 0.7)[:, None]

    def wrong(mask: Tensor) -> float:
        return float((mask != truth).any(1).sum() + (mask.sum(1) > int(0.4 * 192)).sum())

    return wrong(found), wrong(attmask(a, "random", 0.4, 0.7, draw=draw))


@check(
    "attmask",
    "the loss with two small crops, of a host that resizes its places, and its gradients == crop by crop, unmasked",
    below=1e-7,  # timm resizes places in float32
    control="crops in the teacher's place too",
)
def _() -> tuple[float, float]:
    net = MaskedDistiller(small_vit(2, dynamic_img_size=True), 6, spread=0.0, prob=1.0, weights=(0.7, 1.3)).to(F64)
    net.mask_token.data.normal_()
    views, crops = ([torch.randn(2, 3, side, side, dtype=F64) for _ in range(2)] for side in (16, 8))
    masked = torch.rand(4, 16) < 0.4
    vit, head = net.student["vit"], net.student["head"]
    first, last = head[0], head[2]  # type: ignore[index]

    def classes(crop: Tensor) -> Tensor:
        places = vit.pos_embed[:, 1:].unflatten(1, (4, 4)).movedim(3, 1)  # type: ignore[index, union-attr, operator]
        small = F.interpolate(places, (2, 2), mode="bicubic", antialias=True).flatten(2).mT
        p = vit.patch_embed.proj  # type: ignore[union-attr]
        corners = [(i, j) for i in (0, 4) for j in (0, 4)]
        x = torch.stack([(crop[:, None, :, i : i + 4, j : j + 4] * p.weight).sum((2, 3, 4)) + p.bias for i, j in corners], 1)  # type: ignore[union-attr, operator]
        own = vit.cls_token + vit.pos_embed[:, :1]  # type: ignore[index, operator]
        x = torch.cat((own.expand(2, -1, -1), x + small), 1)
        for block in vit.blocks:  # type: ignore[union-attr]
            x = block_by_hand(block, x)
        x = layer_norm(x, vit.norm, 1e-6)[:, 0]  # type: ignore[arg-type]
        return gelu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias  # type: ignore[no-any-return]

    with torch.no_grad():
        wanted = net.seen(net.teacher, torch.cat(views))[0]
    both = net.seen(net.student, torch.cat(views), masked)[0]
    small = [classes(crop) for crop in crops]

    def loss(outs: list[Tensor], targets: list[Tensor]) -> Tensor:
        terms = [
            -(((t / 0.05).softmax(1) * (s / 0.1).log_softmax(1)).sum(1)).mean()
            for i, t in enumerate(targets)
            for j, s in enumerate(outs)
            if i != j
        ]
        ce = -((wanted.patches / 0.06).softmax(2) * (both.patches / 0.1).log_softmax(2)).sum(2)
        return 0.7 * torch.stack(terms).mean() + 1.3 * ((ce * masked).sum(1) / masked.sum(1).clamp_min(1)).mean()

    targets = [*wanted.classes.split(2)]
    outs = [*both.classes.split(2), *small]
    truth, other = loss(outs, targets), loss(outs, [*targets, *small])
    found = net(views, masked, crops, 0.05, 0.06)
    leaves = tuple(p for name, p in net.named_parameters() if p.requires_grad and "vit.head" not in name)
    return gap_with_gradients(found, truth, leaves), naive.gap(found, other)


@check(
    "attmask",
    "share of the digit's patches that high hides at ratio 0.3, by the last attention of the ViT on digits",
    above=0.4,
    control="random masks",
)
def _() -> tuple[float, float]:
    vit, drawn = shipped(), unseen(200)
    x = embedded(vit, drawn.images)
    with torch.no_grad():
        for block in vit.blocks[:-1]:
            x = block(x)
        last = vit.blocks[-1]
        a = weights_of(last.attn, last.norm1(x))[:, :, 0, 1:].mean(1)
    ink = inked(drawn)
    return tuple(float((attmask(a, mode, 0.3, 1.0) & ink).sum() / ink.sum()) for mode in ("high", "random"))  # type: ignore[return-value]
