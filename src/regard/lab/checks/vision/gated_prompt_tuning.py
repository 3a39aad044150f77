"""Checks of gated-prompt-tuning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.planes import layer_norm
from regard.lab.checks.shared.vits import block_by_hand, small_vit, tokens_by_hand
from regard.lab.verification import check
from regard.zoo.vision.gated_prompt_tuning import GatedPromptTuner


def by_hand(tuner: GatedPromptTuner, images: Tensor, gates: Tensor | None, stream: bool = False) -> Tensor:
    """Pooled features; gates (blocks - 1,) after the sigmoid, None: one. stream: the gate on all tokens."""
    vit, n = tuner.vit, tuner.count
    x = tokens_by_hand(vit, images)
    x = torch.cat((x[:, :1], tuner.prompts[:1].expand(len(x), -1, -1), x[:, 1:]), 1)
    for at, block in enumerate(vit.blocks):
        if tuner.kind == "deep":
            x = torch.cat((x[:, :1], tuner.prompts[at : at + 1].expand(len(x), -1, -1), x[:, 1 + n :]), 1)
        before, x = x, block_by_hand(block, x, 1.0 if tuner.temperatures is None else tuner.temperatures[at])
        if gates is not None and at < len(vit.blocks) - 1:
            mixed = gates[at] * x + (1 - gates[at]) * before
            x = mixed if stream else torch.cat((x[:, :1], mixed[:, 1 : 1 + n], x[:, 1 + n :]), 1)
    if tuner.pool == "class":
        return layer_norm(x[:, 0], vit.norm, 1e-6)
    part = {"all": x[:, 1:], "patches": x[:, 1 + n :], "prompts": x[:, 1 : 1 + n]}[tuner.pool]
    return layer_norm(part.mean(1), vit.norm, 1e-6)


def tuned(**options: object) -> GatedPromptTuner:
    tuner = GatedPromptTuner(small_vit(4), 3, **options).to(F64)  # type: ignore[arg-type]
    for p in tuner.parameters():
        if p.requires_grad:
            p.data.add_(0.3 * torch.rand_like(p))
    return tuner


def learned(tuner: GatedPromptTuner) -> tuple[Tensor, ...]:
    return tuple(p for p in tuner.parameters() if p.requires_grad)


@check(
    "gated-prompt-tuning",
    "values and gradients, gates half open, all four pools, learned temperatures and none, and the shallow and deep baselines == by hand",
    below=1e-10,
    control="the gate on every token",
)
def _() -> tuple[float, float]:
    images, gaps = torch.randn(2, 3, 16, 16, dtype=F64), []
    for pool, temperature in (("all", True), ("patches", False), ("prompts", True), ("class", True)):
        tuner = tuned(gate_init=0.5, pool=pool, temperature=temperature)
        assert tuner.gates is not None
        gaps.append(gap_with_gradients(tuner(images), by_hand(tuner, images, torch.sigmoid(tuner.gates)), learned(tuner)))
    assert tuner.gates is not None
    other = naive.gap(tuner(images), by_hand(tuner, images, torch.sigmoid(tuner.gates), stream=True))
    for kind in ("shallow", "deep"):
        tuner = tuned(kind=kind, temperature=kind == "shallow")
        gaps.append(gap_with_gradients(tuner(images), by_hand(tuner, images, None), learned(tuner)))
    return max(gaps), other


@check("gated-prompt-tuning", "open gates (theta = 60), off shallow prompt tuning", below=1e-12, control="closed gates")
def _() -> tuple[float, float]:
    images, tuner = torch.randn(2, 3, 16, 16, dtype=F64), tuned(temperature=False)
    assert tuner.gates is not None
    gaps = []
    for theta in (60.0, -60.0):
        nn.init.constant_(tuner.gates, theta)
        gaps.append(naive.gap(tuner(images), by_hand(tuner, images, None)))
    return gaps[0], gaps[1]


@check("gated-prompt-tuning", "closed gates (theta = -60), off raw prompts put into every block", below=1e-12, control="gates half open")
def _() -> tuple[float, float]:
    images, tuner = torch.randn(2, 3, 16, 16, dtype=F64), tuned(temperature=False)
    raw = GatedPromptTuner(tuner.vit, 3, kind="deep", temperature=False).to(F64)
    raw.prompts.data.copy_(tuner.prompts.data.expand(4, -1, -1))
    assert tuner.gates is not None
    gaps = []
    for theta in (-60.0, 0.0):
        nn.init.constant_(tuner.gates, theta)
        gaps.append(naive.gap(tuner(images), raw(images)))
    return gaps[0], gaps[1]


@check("gated-prompt-tuning", "distance of learned temperatures from [0.01, 10] after a call", below=0.0, control="before it")
def _() -> tuple[float, float]:
    tuner = tuned()
    assert tuner.temperatures is not None
    tuner.temperatures.data.copy_(torch.tensor([-3.0, 0.5, 20.0, 1.0], dtype=F64))

    def off() -> float:
        t = tuner.temperatures.detach()  # type: ignore[union-attr]
        return float(torch.maximum(t - 10, 0.01 - t).max().clamp_min(0))

    before = off()
    tuner(torch.randn(1, 3, 16, 16, dtype=F64))
    return off(), before
