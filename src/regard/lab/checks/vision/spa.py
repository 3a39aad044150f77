"""Checks of spa."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn, joined, split
from regard.lab.checks.shared.patch_mixers import mlp
from regard.lab.checks.shared.planes import image, layer_norm
from regard.lab.verification import check
from regard.tasks.images import named_squares
from regard.zoo.vision.spa import SelectPackAttention, SelectPackBlock, SelectPackNet, pack, selection_labels, selection_loss


def alone(layer: SelectPackAttention, tokens: Tensor) -> Tensor:
    """Attention of one image's kept tokens (n, dim)."""
    q, k, v = (split(y[None], layer.heads) for y in (tokens @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, -1))
    return joined((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)[0] @ layer.out.weight.T + layer.out.bias


def masks() -> Tensor:
    """0 to 11 of 11 tokens kept."""
    return torch.arange(11).expand(6, -1) < torch.tensor([0, 1, 4, 7, 11, 3])[:, None].flip(0)


@check(
    "spa",
    "values and gradients of packed attention, packages of 11, 13, 25 and of the longest image == each image alone",
    below=1e-11,
    control="packages of 5, which cut images",
)
def _() -> tuple[float, float]:
    x, keep, gaps = image(6, 11, 8), masks()[:, torch.randperm(11)], []
    layer = drawn(SelectPackAttention(8, 2))

    def by_hand() -> Tensor:
        truth = torch.zeros_like(x)
        for b in range(6):
            if keep[b].any():
                truth = truth + F.pad(
                    torch.eye(6, dtype=F64)[b][:, None, None] * torch.eye(11, dtype=F64)[keep[b]].T @ alone(layer, x[b, keep[b]]), (0, 0)
                )
        return truth

    leaves = (x, *[p for name, p in layer.named_parameters() if not name.startswith("gate.")])
    for length in (None, 11, 13, 25):
        layer.length = length
        gaps.append(gap_with_gradients(layer(x, keep)[0], by_hand(), leaves))
        gaps.append(float(layer(x, keep)[0].detach()[~keep].abs().max()))
    layer.length = 5
    return max(gaps), naive.gap(layer(x, keep)[0], by_hand())


@check("spa", "pairs that see one another, off the sum of squares of kept tokens", below=0.0, control="everyone padded to the longest")
def _() -> tuple[float, float]:
    keep = masks()
    squares = int(keep.sum(1).square().sum())
    return float(abs(pack(torch.randn(6, 11, 4), keep, 16).pairs - squares)), float(6 * 11**2 - squares)


@check("spa", "what a change of the first image changes in the others of its package", below=0.0, control="without segments")
def _() -> tuple[float, float]:
    layer, keep = SelectPackAttention(8, 2, 40), torch.rand(4, 9) < 0.6
    x = torch.randn(4, 9, 8)
    y = torch.cat((torch.randn(1, 9, 8), x[1:]))

    def leak(segments: bool) -> float:
        found = []
        for z in (x, y):
            packed = pack(z, keep, 40)
            assert len(packed.tokens) == 1
            packed = packed if segments else packed._replace(segments=torch.zeros_like(packed.segments))
            found.append(layer.inside(packed)[packed.segments.eq(packed.segments) & packed.real & (packed.numbers >= 9)])
        return naive.gap(found[0], found[1])

    return leak(True), leak(False)


@check(
    "spa",
    "a block on tokens that its gate keeps, values and gradients straight through == by hand; the others bit for bit",
    below=1e-10,
    control="the gate's own gradient, which a hard choice would leave at zero",
)
def _() -> tuple[float, float]:
    block, x = drawn(SelectPackBlock(8, 2, ratio=2.0)), image(3, 7, 8)

    def by_hand(soft: bool) -> Tensor:
        y = layer_norm(x, block.norm1)
        s = torch.sigmoid(y @ block.attention.gate.score.weight[0] + block.attention.gate.score.bias)
        keep, rows = s > 0.5, []
        for b in range(3):
            full = x[b]
            if keep[b].any():
                own = x[b, keep[b]] + alone(block.attention, y[b, keep[b]])
                full = full.index_put((keep[b].nonzero()[:, 0],), own + mlp(layer_norm(own, block.norm2), block.mlp))
            factor = keep[b].double() + (s[b] - s[b].detach() if soft else 0)
            rows.append(x[b] + (full - x[b]) * factor[:, None])
        return torch.stack(rows)

    found, scores = block(x)
    keep = scores > 0
    assert 0 < int(keep.sum()) < 21 and torch.equal(found[~keep], x[~keep])
    leaves = (x, *block.parameters())
    other = torch.autograd.grad(found.sum(), block.attention.gate.score.weight, retain_graph=True)[0]
    return gap_with_gradients(found, by_hand(True), leaves), float(other.abs().max())


@check(
    "spa",
    "a block in windows of 3 x 3 on 5 x 7 tokens, straight and shifted by 1 and 2, values and gradients == the block on each window alone",
    below=1e-10,
    control="windows that are not shifted",
)
def _() -> tuple[float, float]:
    x, gaps, other = image(2, 35, 8), [], 0.0
    for shift in (0, 1, 2):
        block = drawn(SelectPackBlock(8, 2, ratio=2.0, window=3, shift=shift))

        def by_hand(shift: int, block: SelectPackBlock = block) -> tuple[Tensor, Tensor]:
            cells = [(i, j) for i in range(5) for j in range(7)]
            names = [((i - shift) // 3, (j - shift) // 3) for i, j in cells]
            out, scores = torch.zeros_like(x), torch.zeros(2, 35, dtype=F64)
            for name in set(names):
                at = torch.tensor([n for n, one in enumerate(names) if one == name])
                part, score = block.chosen(x[:, at])  # which the check above holds
                out, scores = out.index_copy(1, at, part), scores.index_copy(1, at, score)
            return out, scores

        (found, scores), (truth, wanted) = block(x, (5, 7)), by_hand(shift)
        assert 0 < int((scores > 0).sum()) < 70
        gaps += [naive.gap(scores, wanted), gap_with_gradients(found, truth, (x, *block.parameters()))]
        if shift:
            other = max(other, naive.gap(found, by_hand(0)[0]))
    return max(gaps), other


@check("spa", "F1 of what a net keeps of patches with a square on them, second stage, after 100 steps", above=0.9, control="untrained")
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    net, generator = SelectPackNet((16, 32), (1, 1), (2, 2), classes=3), torch.Generator().manual_seed(0)

    def score() -> float:
        x, _, squares = named_squares(50, generator)
        with torch.no_grad():
            found = net(x)[1]
        hits = total = 0.0
        for s in found[1:]:
            label = selection_labels(squares.any(1), s.shape[1:])
            hits, total = hits + float((label & (s > 0)).sum()), total + float(label.sum() + (s > 0).sum())
        return 2 * hits / total

    before = score()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(100):
        x, name, squares = named_squares(16, generator)
        logits, scores = net(x)
        optimizer.zero_grad()
        (0.1 * F.cross_entropy(logits, name) + selection_loss(scores, squares.any(1))).backward()
        optimizer.step()
    return score(), before
