"""Ranks of token mixers: the shapes that a model looks for, the course of self-distillation, and reports of small or odd matrices."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard import RegardError
from regard.zoo.linear.mamba_rank_analysis import (
    RankReport,
    VisionMamba,
    binary_auc,
    dino_run,
    effective_rank,
    mixing_ranks,
    rank_report,
    shapes,
    token_mixing_matrix,
)


def test_shapes_are_textured_discs_and_squares_on_noise() -> None:
    images, masks = shapes(600, 16, seed=3)
    assert images.shape == (600, 1, 16, 16) and masks.shape == (600, 16, 16) and masks.dtype == torch.bool
    y, x = torch.arange(16)[:, None], torch.arange(16)
    squares, radii, rows, columns = 0, set(), set(), set()
    for mask in masks:
        high, wide = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        r, cy, cx = (len(high) - 1) // 2, int(high[len(high) // 2]), int(wide[len(wide) // 2])
        square, disc = (y - cy).abs().maximum((x - cx).abs()) <= r, (y - cy) ** 2 + (x - cx) ** 2 <= r * r
        assert len(high) == len(wide) == 2 * r + 1 and (torch.equal(mask, square) or torch.equal(mask, disc))
        squares += torch.equal(mask, square)
        radii.add(r)
        rows.add(cy)
        columns.add(cx)
    assert radii == {2, 3, 4} and rows == columns == set(range(4, 12)) and 240 < squares < 360
    noise = images[:, 0] - masks * (1 + 0.5 * torch.sin(1.5 * x))
    for part in (noise[masks], noise[~masks]):
        assert float(part.mean()) == pytest.approx(0, abs=0.01) and float(part.std()) == pytest.approx(0.3, abs=0.01)


def test_self_distillation_follows_its_recipe() -> None:
    """Both views through student and teacher, each learns from the other's; AdamW; teacher and centre are averages."""
    steps, seed, dim, outputs, batch, lr = 4, 5, 8, 6, 4, 0.05
    found = dino_run(steps, dim, outputs, batch, lr, seed)
    torch.manual_seed(seed)

    def made() -> nn.ModuleList:
        return nn.ModuleList((VisionMamba(1, dim, 2, 4, 16), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, outputs)))

    student, teacher = made(), made()
    teacher.load_state_dict(student.state_dict())
    images, masks = shapes(256, 16, seed)

    def out(nets: nn.ModuleList, x: Tensor) -> Tensor:
        return nets[2](F.gelu(nets[1](nets[0](x).mean(1))))  # type: ignore[no-any-return]

    @torch.no_grad()
    def auc() -> float:
        coarse = masks[:64].float().unflatten(1, (4, 4)).unflatten(3, (4, 4)).mean((2, 4)) > 0.3
        return binary_auc(student[0](images[:64]).square().sum(-1).sqrt().view(64, 4, 4), coarse)

    before, centre, losses = auc(), torch.zeros(outputs), []
    optimiser = torch.optim.AdamW(student.parameters(), lr)
    for step in range(steps):
        x = images[torch.randint(256, (batch,))]
        views = []
        for _ in range(2):
            down, right = torch.randint(-2, 3, (2,)).tolist()
            views.append(torch.roll(x, (down, right), (-2, -1)) + 0.1 * torch.randn_like(x))
        with torch.no_grad():
            told = [out(teacher, view) for view in views]
        loss = torch.zeros(())
        for a, b in ((0, 1), (1, 0)):
            target = ((told[b] - centre) / 0.04).softmax(-1)
            loss = loss - (target * (out(student, views[a]) / 0.1).log_softmax(-1)).sum(-1).mean() / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        follow = 0.004 * (1 - step / steps)
        with torch.no_grad():
            for new, old in zip(student.parameters(), teacher.parameters(), strict=True):
                old += follow * (new - old)
        centre = centre + 0.1 * (torch.cat(told).mean(0) - centre)
        losses.append(float(loss))
    assert found.losses == pytest.approx(losses, rel=1e-5)
    assert (found.auc_before, found.auc_after) == pytest.approx((before, auc()), abs=1e-4)


def test_ranks_are_those_of_four_layers_drawn_alike() -> None:
    found = mixing_ranks(length=12, state=3, dim=4, seed=1)
    assert list(found) == ["softmax", "linear", "mamba", "mamba-bidirectional"]
    torch.manual_seed(1)
    torch.randn(1, 12, 4, dtype=torch.float64)
    q, k = (2 * torch.randn(12, 3, dtype=torch.float64) for _ in range(2))
    positive = q.relu() @ k.relu().T
    for name, m in (("softmax", (q @ k.T / 3**0.5).softmax(-1)), ("linear", positive / (positive.sum(-1, keepdim=True) + 1e-6))):
        assert found[name].effective == pytest.approx(float(effective_rank(m)), rel=1e-6)
    assert [at for at, _ in found["mamba"].curve] == [1, 2, 4, 5, 6, 8, 9, 10]
    assert mixing_ranks(12, 3, 4, 1) == found != mixing_ranks(12, 3, 4, 2)


def test_reports_of_few_tokens_and_what_has_none() -> None:
    report = rank_report(torch.eye(3, dtype=torch.float64))
    assert report == RankReport(3, 0, pytest.approx(3.0), ((1, pytest.approx(1.0)), (2, pytest.approx(1.0))))
    assert float(effective_rank(torch.zeros(2, 3, 3))[0]) == 1.0
    svg = RankReport(2, 1, 1.5, ((1, 1.25), (2, 1.75))).plot()
    assert all(text in svg for text in ("Rank across a cut", ">cut<", ">effective rank of the block below<"))
    for bad in (torch.zeros(2, 3), torch.zeros(1, 2, 2)):
        with pytest.raises(RegardError, match="one square matrix"):
            rank_report(bad)
    for layer in (nn.Linear(4, 4), regard.nn.Attention(16, 2, regard.get("performer", features=8), causal=False)):
        if isinstance(layer, nn.Linear) or layer.weights(torch.randn(1, 5, 16)) is None:
            with pytest.raises(RegardError, match=type(layer).__name__):
                token_mixing_matrix(layer, torch.randn(1, 5, 16))


def test_auc_counts_pairs_of_images_that_have_both_kinds() -> None:
    torch.manual_seed(0)
    values = torch.randint(5, (4, 6, 6)).double()  # with ties
    mask = torch.rand(4, 6, 6) < 0.4
    mask[1], mask[2] = True, False
    shares = []
    for at in (0, 3):
        inside, outside = values[at][mask[at]], values[at][~mask[at]]
        gap = inside[:, None] - outside
        shares.append(float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean()))
    assert binary_auc(values, mask) == pytest.approx(sum(shares) / 2)
    with pytest.raises(RegardError, match="no image"):
        binary_auc(values[1:3], mask[1:3])
    for wrong in (mask[:3], mask.double()):
        with pytest.raises(RegardError, match="expected the same shape"):
            binary_auc(values, wrong)
    assert math.isfinite(binary_auc(values.half(), mask))
